"""Write the trained parts as a standard StableDiffusionPipeline folder in fp16, and the held-out pictures
beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import torch
from autoencoder import build_autoencoder
from diffusers import StableDiffusionPipeline
from diffusion import build_scheduler, build_text_encoder, build_unet
from pictures import HERE
from PIL import Image
from sources import LICENCES, WORK
from transformers import CLIPTokenizer


def export_pipeline(work: Path, folder: Path, weights: str = "ema") -> None:
    """Save `work`'s trained networks (`weights`: ema or raw) in `folder`."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    trained = torch.load(work / "diffusion.pt", weights_only=True)[weights]
    parts = {"unet": build_unet(), "text": build_text_encoder(tokenizer), "vae": build_autoencoder()}
    parts["vae"].load_state_dict(torch.load(work / "vae.pt", weights_only=True))
    for name in ("unet", "text"):
        parts[name].load_state_dict(
            {
                key.removeprefix(f"{name}."): value
                for key, value in trained.items()
                if key.startswith(f"{name}.")
            }
        )
    pipeline = StableDiffusionPipeline(
        vae=parts["vae"],
        text_encoder=parts["text"],
        tokenizer=tokenizer,
        unet=parts["unet"],
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for path in folder.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
    pipeline.to(torch.float16).save_pretrained(folder)
    _write_slow_tokenizer(folder / "tokenizer")


def _write_slow_tokenizer(folder: Path) -> None:
    """Tools on older transformers read vocab.json and merges.txt instead of tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def export_concepts(work: Path, folder: Path) -> None:
    """Save the held-out pictures as `folder/<synset>/<n>.png`, with a table of where each comes from.

    Tux Paint's stamps stay out: their licence (GPL) would bind whoever passes the package on.
    """
    pictures = torch.load(work / "pictures.pt", weights_only=True)
    with open(HERE / "pictures.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "held"]
    numbers: Counter[str] = Counter()
    table = []
    for row, picture in zip(rows, pictures["held96"], strict=True):
        if row["collection"] == "stamps":
            continue
        file_name = Path(row["synset"]) / f"{numbers[row['synset']]}.png"
        numbers[row["synset"]] += 1
        (folder / file_name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / file_name, optimize=True)
        table.append((str(file_name), row["collection"], row["file"], LICENCES[row["collection"]]))
    with open(folder / "sources.csv", "w", newline="") as out:
        csv.writer(out).writerows([("picture", "collection", "file", "licence"), *table])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    assets = HERE.parents[1] / "t2iprobe" / "assets"
    parser.add_argument("--assets", type=Path, default=assets)
    options = parser.parse_args()
    export_pipeline(options.work, options.assets / "embedded_model", options.weights)
    export_concepts(options.work, options.assets / "concepts")

"""What the embedded model can draw: chance, real pictures, reconstructions and generations side by side,
with intervals.

    python benchmarks/embedded_model.py [--work DIR] [--out DIR] [--samples 8] [--sheet FILE.png]

DIR is where `recipes/embedded_model/pictures.py build` left the training pictures; without it the columns
of real pictures
and reconstructions are left out. The run in --out resumes like any other.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2iprobe.config import load_study
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.sampling import DiffusersSampler
from t2iprobe.hypernymy.scoring import load_scorer
from t2iprobe.hypernymy.statistics import analyse
from t2iprobe.hypernymy.study import load_sampler, run_study
from t2iprobe.pipelines import best_device, best_dtype

RECIPE = Path(__file__).parents[1] / "recipes" / "embedded_model"
JUDGES = ["embedded", "efficientnet-lite1", "efficientnet-lite2"]
UNSEEN = 40
Logits = dict[str, np.ndarray]


def list_words(hierarchy: Hierarchy) -> dict[str, list[str]]:
    """The synsets of each group: trained leaves, hypernyms that captions named, held-out concepts, other
    unseen leaves.
    """
    with open(RECIPE / "pictures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    trained = sorted({row["synset"] for row in rows if row["part"] == "train"})
    held = sorted({row["synset"] for row in rows if row["part"] == "held"})
    named, level = set(), set(trained)
    for _ in range(4):
        level = {parent for synset in level for parent in hierarchy.parents(synset)}
        named |= level
    others = [leaf for leaf in hierarchy.leaves if leaf not in trained and leaf not in held]
    unseen = np.random.default_rng(0).choice(others, UNSEEN, replace=False)
    above = sorted(named & set(hierarchy.synsets))
    return {
        "trained leaves": trained,
        "non-leaf words": above,
        "held-out words": held,
        "unseen words": sorted(map(str, unseen)),
    }


def judge_tensors(pictures: torch.Tensor, labels: list[str], judge: str) -> Logits:
    """Logits by synset of uint8 pictures [N, 3, H, W]."""
    scores = load_scorer(judge).score(list(pictures.permute(0, 2, 3, 1).numpy()))
    return {name: scores[[label == name for label in labels]] for name in sorted(set(labels))}


@torch.inference_mode()
def reconstruct(sampler: DiffusersSampler, pictures: torch.Tensor) -> torch.Tensor:
    """Through the autoencoder and back: uint8 [N, 3, 64, 64]."""
    vae, made = sampler.pipeline.vae, []
    for part in pictures.split(32):
        latents = vae.encode(part.to(vae.device, vae.dtype) / 127.5 - 1).latent_dist.mean
        made.append(((vae.decode(latents).sample.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
    return torch.cat(made)


def retrieve(
    logits: Logits, hierarchy: Hierarchy, top: int, resamples: int = 2000
) -> tuple[float, float, float]:
    """Share of pictures whose own class is among the `top` of the classes in `logits`, with its interval
    over synsets.
    """
    names = sorted(logits)
    classes = [hierarchy.classes.index(name) for name in names]
    hits = np.array(
        [
            ((-logits[name][:, classes]).argsort(1)[:, :top] == position).any(1).mean()
            for position, name in enumerate(names)
        ]
    )
    draws = np.random.default_rng(0).choice(hits, (resamples, len(hits))).mean(1)
    return float(hits.mean()), *(float(bound) for bound in np.quantile(draws, (0.025, 0.975)))


def summarise(logits: Logits, everything: Logits, hierarchy: Hierarchy) -> dict[str, Any]:
    """ISP of a group with its interval over synsets, its chance (what unrelated prompts give), and the share
    above chance.
    """
    found = analyse(logits, hierarchy)
    isp = found["results"]["isp"]
    rows = {row["synset"]: row for row in analyse(everything, hierarchy, resamples=10)["synsets"]}
    chance = [rows[name]["chance"] for name in logits]
    return {
        "synsets": len(logits),
        "isp": isp["value"],
        "interval": isp["interval_synsets"],
        "chance": float(np.mean([value for value in chance if value is not None])),
        "known": float(np.mean([row["known"] for row in found["synsets"]])),
        "test": found["unknown_test"]["text"],
    }


def measure_seconds(sampler: DiffusersSampler, entries: list, batch: int = 16, rounds: int = 9) -> float:
    """Median seconds a picture over `rounds` batches, after a warm-up."""
    sampler.sample(entries[:batch])
    times = []
    for start in range(0, rounds * batch, batch):
        began = time.perf_counter()
        sampler.sample(entries[start : start + batch])
        times.append((time.perf_counter() - began) / batch)
    return statistics.median(times)


def draw_sheet(pictures: dict[str, list[np.ndarray]], file: Path, columns: int = 13) -> None:
    """A contact sheet: two pictures of each word with its name below."""
    from PIL import Image, ImageDraw

    width, height = 136, 84
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (name, made) in enumerate(pictures.items()):
        left, upper = place % columns * width, place // columns * height
        for number, picture in enumerate(made[:2]):
            sheet.paste(Image.fromarray(picture).resize((64, 64)), (left + 2 + number * 66, upper))
        pen.text((left + 4, upper + 67), name.rsplit(".", 2)[0].replace("_", " ")[:21], fill="black")
    sheet.save(file, optimize=True)


def main() -> None:
    """Draw, judge, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/embedded_model_benchmark"))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--judges", nargs="+", default=JUDGES)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    hierarchy = Hierarchy.imagenet()
    words = list_words(hierarchy)
    wanted = sorted({name for group in words.values() for name in group})
    study = load_study(
        "embedded",
        {
            "model": options.model,
            "classifiers": options.judges,
            "synsets": ",".join(wanted),
            "samples": options.samples,
            "keep": "all",
        },
    )
    run = run_study(study, options.out)
    device = best_device()
    sampler = load_sampler(study, device, best_dtype(device))
    groups = {"real": {}, "reconstructed": {}}
    if options.work:
        stored = torch.load(options.work / "pictures.pt", weights_only=True)
        for group, (part, labels) in {
            "trained leaves": ("P64", "labels"),
            "held-out words": ("heldP64", "heldlabels"),
        }.items():
            remade = reconstruct(load_sampler(study, device, "float32"), stored[part])
            groups["real"][group] = (stored[part], stored[labels])
            groups["reconstructed"][group] = (remade, stored[labels])
    report: dict[str, Any] = {"seconds_per_picture": measure_seconds(sampler, run.plan)}
    for judge in options.judges:
        everything = run.logits(judge)
        table = {}
        for group, names in words.items():
            made = {name: everything[name] for name in names}
            row = summarise(made, everything, hierarchy)
            for kind, tensors in groups.items():
                if group in tensors:
                    row[kind] = analyse(judge_tensors(*tensors[group], judge), hierarchy)["results"]["isp"]
            table[group] = row
        leaves = {name: everything[name] for name in words["trained leaves"]}
        report[judge] = {
            "groups": table,
            "top1": retrieve(leaves, hierarchy, 1),
            "top5": retrieve(leaves, hierarchy, 5),
        }
        print(format_table(judge, report[judge], options.samples))
    print(
        f"{report['seconds_per_picture']:.4f} s a picture "
        f"({study.steps} steps, guidance {study.guidance}, {device})"
    )
    (options.out / "benchmark.json").write_text(json.dumps(report, indent=1))
    if options.sheet:
        from PIL import Image

        read = {
            name: [np.asarray(Image.open(path)) for path in run.pictures(name)[:2]]
            for name in words["trained leaves"]
        }
        draw_sheet(read, options.sheet)


def format_table(judge: str, found: dict[str, Any], samples: int) -> str:
    """One judge's Markdown table."""

    def show(cell: dict[str, Any] | None, key: str = "value", interval: str = "interval_synsets") -> str:
        if cell is None:
            return "–"
        return f"{cell[key]:.4f} [{cell[interval][0]:.4f}, {cell[interval][1]:.4f}]"

    lines = [
        f"\n**{judge}**, {samples} pictures a word, mean ISP [95 % over words]\n",
        "| words | n | chance | real | reconstructed | generated | times chance | above chance (FDR 5 %) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group, row in found["groups"].items():
        lines.append(
            f"| {group} | {row['synsets']} | {row['chance']:.4f} "
            f"| {show(row.get('real'))} | {show(row.get('reconstructed'))} "
            f"| {show(row, 'isp', 'interval')} | {row['isp'] / row['chance']:.1f} | {row['known']:.0%} |"
        )
    for name, label in (("top1", "top-1"), ("top5", "top-5")):
        value, low, high = found[name]
        lines.append(f"\nRetrieval among the trained leaves, {label}: {value:.3f} [{low:.3f}, {high:.3f}]")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

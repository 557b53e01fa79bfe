"""Pictures of captions, as of COCO, and their scores: FID against real ones, CLIPScore against the text.

As published (arXiv 2310.09247): 10,000 captions drawn with seed 0, real pictures squashed to 512 × 512, FID
on Inception's 2048 features, CLIPScore by ViT-B/16 over 100. Both come from torchmetrics, which is given
uint8: floats in [0, 1] would be scaled a second time by the processors of today.

    DIR/coco.json            what the pictures depend on, and their captions
    DIR/pictures/*.png       in the order of the captions; the same command draws those that are missing
    DIR/results.json         the scores
"""

import io
import json
import pickle
import random
import time
import urllib.error
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from t2iprobe.clip import pooled
from t2iprobe.config import Study, dump_study
from t2iprobe.devices import resolve_device, resolve_dtype
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.captions import read_captions
from t2iprobe.hypernymy.study import load_sampler
from t2iprobe.intervals import describe_mean
from t2iprobe.machine import list_versions
from t2iprobe.pictures import picture_files, read_picture, resize_picture
from t2iprobe.pipelines import model_hash, read_scheduler
from t2iprobe.plans import PlanEntry, picture_seed
from t2iprobe.storage import explain_full_disk, remove_leftovers, write_atomically, write_output

if TYPE_CHECKING:
    import torch

__all__ = ["choose_captions", "frechet_distance", "run_coco", "score_captions"]

SCHEMA = "t2iprobe.coco/1"
COUNT, SEED, REAL_SIDE = 10_000, 0, 512
FEATURES = 2048  # of Inception's last pooling
Progress = Callable[[int, int], None]


def choose_captions(path: Path, count: int = COUNT, column: str | None = None) -> list[str]:
    """Return `count` captions of a file, drawn with seed 0 as published; all of a shorter file, in order."""
    captions = [caption for caption in read_captions(path, column) if caption]
    if not captions:
        raise UserError(f"{path} holds no captions")
    return captions if len(captions) <= count else random.Random(SEED).sample(captions, count)


def run_coco(
    study: Study,
    captions: Sequence[str],
    out: Path,
    *,
    real: Path | None = None,
    clip: str | None = None,
    inception: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw a picture of each caption into `out`, or go on with what is there, and score them.

    Args:
        study: the model and how it draws; words and classifiers do not matter.
        captions: texts, in this order.
        out: folder.
        real: folder of real pictures for FID.
        clip: folder or hub id of a transformers CLIP for CLIPScore.
        inception: file with the weights of torch-fidelity's Inception, where they cannot be downloaded.
        progress: called with (pictures drawn, of how many).

    Raises UserError where `out` holds pictures of other captions or settings, and where weights are missing:
    what is drawn is kept.
    """
    if real is not None and (not real.is_dir() or not picture_files(real)):
        raise UserError(f"there is no folder of real pictures {real}")
    manifest = _make_manifest(study, captions)
    _open_folder(out, manifest)
    entries = _list_entries(study, captions)
    missing = [entry for entry in entries if not _picture_path(out, entry).exists()]
    if missing:
        _draw(study, missing, out, manifest["identity"]["dtype"], len(entries), progress)
    paths = [_picture_path(out, entry) for entry in entries]
    scores: dict[str, Any] = {}
    if real is not None:
        drawn = (read_picture(path) for path in paths)
        squashed = (resize_picture(read_picture(path), REAL_SIDE) for path in picture_files(real))
        extractor = load_inception(inception, resolve_device(study.device))
        scores["fid"] = frechet_distance(squashed, drawn, extractor, FEATURES)
    if clip is not None:
        scores["clip_score"] = score_captions(paths, captions, clip, resolve_device(study.device))
    results = {
        "schema": SCHEMA,
        "pictures": len(entries),
        **scores,
        "configuration": manifest["configuration"],
    }
    text = json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    write_output(out / "results.json", text.encode())
    return results


def plan_coco(study: Study, captions: Sequence[str], out: Path) -> dict[str, Any]:
    """Describe what `run_coco` would draw, with its cost, measured by one batch that is thrown away."""
    manifest = _make_manifest(study, captions)
    entries = _list_entries(study, captions)
    missing = [entry for entry in entries if not _picture_path(out, entry).exists()]
    seconds = None
    if missing:
        sampler = load_sampler(study, resolve_device(study.device), manifest["identity"]["dtype"])
        batch = missing[: study.pictures_at_once]
        sampler.sample(batch[:1])  # the first call of a network sets it up
        begin = time.perf_counter()
        sampler.sample(batch)
        seconds = (time.perf_counter() - begin) / len(batch) * len(missing)
    return {
        "pictures": len(entries),
        "stored": len(entries) - len(missing),
        "predicted_seconds": seconds,
        "first_prompt": entries[0].prompt,
        "configuration": manifest["configuration"],
    }


def _make_manifest(study: Study, captions: Sequence[str]) -> dict[str, Any]:
    keys = ("steps", "guidance", "size", "resize", "seed")
    configuration = dump_study(study)
    scheduler = study.scheduler or read_scheduler(study.model, variant=study.variant)
    return {
        "schema": SCHEMA,
        "identity": {
            "model": model_hash(study.model, variant=study.variant),
            "scheduler": scheduler,
            "dtype": resolve_dtype(study.dtype, resolve_device(study.device)),
            **{key: configuration[key] for key in keys},
        },
        "captions": list(captions),
        "configuration": {
            key: configuration[key] for key in ("model", "variant", "scheduler", "dtype", *keys)
        },
        "versions": list_versions(),
    }


def _open_folder(out: Path, manifest: Mapping[str, Any]) -> None:
    path = out / "coco.json"
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            changed = [
                key for key, value in manifest["identity"].items() if stored["identity"].get(key) != value
            ]
            changed += ["captions"] if stored["captions"] != manifest["captions"] else []
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged: give another --out") from None
        if changed:
            raise UserError(f"{out} holds pictures of another {', '.join(changed)}: give another --out")
    else:
        try:
            (out / "pictures").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}") from None
        write_output(path, (json.dumps(manifest, ensure_ascii=False, indent=1) + "\n").encode())
    remove_leftovers(out / "pictures")


def _list_entries(study: Study, captions: Sequence[str]) -> list[PlanEntry]:
    return [
        PlanEntry("caption", "caption", index, caption, picture_seed(study.seed, caption, "caption", index))
        for index, caption in enumerate(captions)
    ]


def _picture_path(out: Path, entry: PlanEntry) -> Path:
    return out / "pictures" / f"{entry.index:06d}.png"


def _draw(
    study: Study, missing: Sequence[PlanEntry], out: Path, dtype: str, total: int, progress: Progress | None
) -> None:
    from PIL import Image

    sampler = load_sampler(study, resolve_device(study.device), dtype)
    size, before = study.pictures_at_once, total - len(missing)
    for start in range(0, len(missing), size):
        batch = missing[start : start + size]
        with explain_full_disk(out):
            for entry, picture in zip(batch, sampler.sample(batch), strict=True):
                assert picture is not None
                content = io.BytesIO()
                resized = picture if study.resize is None else resize_picture(picture, study.resize)
                Image.fromarray(resized).save(content, "PNG")
                write_atomically(_picture_path(out, entry), content.getvalue())
        if progress is not None:
            progress(before + start + len(batch), total)


def load_inception(weights: Path | None, device: str) -> "torch.nn.Module":
    """Load torch-fidelity's Inception, from a file or by download; UserError where it cannot be had."""
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ModuleNotFoundError:
        raise UserError(_MISSING) from None
    if weights is not None and not weights.is_file():
        raise UserError(f"there is no file of Inception's weights {weights}")
    try:
        return NoTrainInceptionV3(
            "inception-v3-compat", [str(FEATURES)], None if weights is None else str(weights)
        ).to(device)
    except ModuleNotFoundError:
        raise UserError(_MISSING) from None
    except urllib.error.URLError as error:
        raise UserError(
            f"cannot download Inception's weights ({error.reason}): give torch-fidelity's "
            "pt_inception-2015-12-05 file by --inception"
        ) from None
    except (
        OSError, RuntimeError, ValueError, KeyError, AttributeError, EOFError, pickle.UnpicklingError
    ) as error:  # fmt: skip
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"cannot load Inception's weights from {weights} ({reason})") from None


_MISSING = "FID and CLIPScore need torchmetrics and torch-fidelity: pip install 't2iprobe[judges]'"


def frechet_distance(
    real: Iterator[np.ndarray], drawn: Iterator[np.ndarray], extractor: "torch.nn.Module", features: int
) -> dict[str, Any]:
    """Return the Fréchet distance of two sets of pictures uint8 [H, W, 3] by an extractor's features.

    It is biased upwards for few pictures: compare at equal numbers only; they stand beside it.
    """
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    extractor.num_features = features  # type: ignore[assignment]  # else torchmetrics tries a random one
    device = next(extractor.parameters(), torch.empty(0)).device
    metric = FrechetInceptionDistance(feature=extractor).to(device)
    counts = []
    for pictures, is_real in ((real, True), (drawn, False)):
        count = 0
        for picture in pictures:
            metric.update(torch.from_numpy(picture).permute(2, 0, 1)[None].to(device), real=is_real)
            count += 1
        counts.append(count)
    if min(counts) < 2:
        raise UserError("FID needs two pictures at least, real and drawn")
    return {"value": float(metric.compute()), "real": counts[0], "drawn": counts[1]}


def _return_vectors(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method as torchmetrics expects it of transformers 4: a tensor, not a record."""
    return lambda *arguments, **named: pooled(method(*arguments, **named))


def score_captions(paths: Sequence[Path], captions: Sequence[str], clip: str, device: str) -> dict[str, Any]:
    """Return the mean CLIPScore of pictures with their captions, over 100 as published, with its interval.

    A cosine below 0 counts as 0 (Hessel and others 2021).
    """
    import torch

    try:
        from torchmetrics.multimodal.clip_score import CLIPScore
    except ModuleNotFoundError:
        raise UserError(_MISSING) from None
    from transformers import CLIPModel, CLIPProcessor

    try:
        # A pair of its own: by name torchmetrics takes no folder.
        network: Any = CLIPModel.from_pretrained(clip)
        for name in ("get_image_features", "get_text_features"):
            setattr(network, name, _return_vectors(getattr(network, name)))
        pair = network, CLIPProcessor.from_pretrained(clip)
        metric = CLIPScore(lambda: pair).to(device)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"cannot load the CLIP {clip} ({reason}): give a folder of transformers by --clip FOLDER"
        ) from None
    scores = []
    with torch.inference_mode():
        for path, caption in zip(paths, captions, strict=True):
            picture = torch.from_numpy(read_picture(path)).permute(2, 0, 1).to(device)
            scores.append(float(metric(picture, caption)) / 100)
    return {**describe_mean(scores), "judge": clip, "pictures": len(scores)}

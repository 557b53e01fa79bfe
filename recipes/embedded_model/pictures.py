"""Choose the training pictures: names are matched to synsets, the judge and a person's list decide.

`propose` makes `pictures.csv` from the sources; it and `reviewed.csv` (what a person saw to be wrong on the
contact sheet) are in the repository. `build` reads `pictures.csv` and makes the tensors that training reads.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from judge import judge_pictures
from PIL import Image
from sources import WORK, Source, download, list_sources
from torch import Tensor

from t2iprobe import wordnet
from t2iprobe.hypernymy.hierarchy import Hierarchy

HERE = Path(__file__).parent
HELD_OUT = [
    "ambulance.n.01",
    "bucket.n.01",
    "crutch.n.01",
    "harp.n.01",
    "jigsaw_puzzle.n.01",
    "joystick.n.02",
    "maraca.n.01",
    "mortarboard.n.02",
    "plunger.n.03",
    "pretzel.n.01",
    "soccer_ball.n.01",
    "sunglass.n.01",
    "teapot.n.01",
    "tiger.n.02",
]
# Pictures whose names speak of a held-out concept never train anything, the autoencoder included.
HELD_OUT_WORDS = re.compile(
    "tiger|harp|ambulan|bucket|maraca|soccer|football|teapot|kettle|pretzel|joystick|puzzle|jigsaw|plunger"
    "|mortar|graduat|sunglass|glasses|crutch|star|gradient|arrow|flag|led |button|icon|letter|shadow"
)
IGNORED_WORDS = re.compile(
    "a|an|the|of|with|in|on|and|to|from|by|for|at|is|old|new|small|large|big|black|white|red|green|blue|yellow"
    "|face|left|right|one|two|open|side|top"
)
MOST_PER_SYNSET = 5
FIELDS = ("part", "synset", "collection", "file", "isp")


def load_picture(path: Path, size: int) -> Image.Image | None:
    """The picture cut to its content, on a white square with a 4 % margin, `size` pixels wide; None if
    nothing is visible.
    """
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 12)).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    side = int(max(picture.size) * 1.08)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3)


def as_tensor(pictures: list[Image.Image]) -> Tensor:
    """uint8 [N, 3, H, W]."""
    return (
        torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def score_sources(sources: list[Source], cache: Path) -> dict:
    """Every visible source at 96 and 64 pixels with its logits at both: keep [M], P, P64, l96, l64."""
    if not cache.exists():
        loaded = {index: load_picture(source.path, 96) for index, source in enumerate(sources)}
        visible = {index: picture for index, picture in loaded.items() if picture is not None}
        large = as_tensor(list(visible.values()))
        small = as_tensor(
            [picture.resize((64, 64), Image.Resampling.LANCZOS) for picture in visible.values()]
        )
        scores = {"keep": list(visible), "P": large, "P64": small}
        torch.save({**scores, "l64": judge_pictures(small), "l96": judge_pictures(large)}, cache)
    return torch.load(cache, weights_only=True)


def candidate_synsets(names: tuple[str, ...], known: set[str]) -> list[str]:
    """Synsets of the hierarchy that a picture's names may mean: runs of up to four words, the first four
    noun senses.
    """
    found: dict[str, None] = {}
    for name in names:
        words = [word for word in name.split() if word not in ("a", "an", "the")]
        for length in range(min(4, len(words)), 0, -1):
            for start in range(len(words) - length + 1):
                run = words[start : start + length]
                if length == 1 and (IGNORED_WORDS.fullmatch(run[0]) or len(run[0]) < 3):
                    continue
                for form in sorted({"_".join(run), "".join(run), "-".join(run)}):
                    for sense in wordnet.reader().synsets(form, "n")[:4]:
                        if sense.name() in known:
                            found.setdefault(sense.name())
    return list(found)


def match(source: Source, p64: np.ndarray, p96: np.ndarray, hierarchy: Hierarchy) -> str | None:
    """The leaf synset that a picture shows, or None: a name says what it may be, the judge which sense and
    which leaf.

    p64, p96: class probabilities [1000] at 64 and 96 pixels. A picture named by a hypernym (*clock*)
    gets the leaf that the
    judge sees, if it lies below that name and has a probability above .4.
    """
    named = candidate_synsets(source.names, set(hierarchy.all_synsets))
    if not named:
        return None
    seen = {name: float((p64 + p96)[hierarchy.subtree(name)].sum()) for name in named}
    likely = [name for name in named if seen[name] >= 0.7 * max(seen.values())]
    best = min(likely, key=lambda name: hierarchy.subtree(name).sum())
    if best in hierarchy.leaves:
        return best
    top = int((p64 + p96).argmax())
    below = hierarchy.subtree(best)
    return hierarchy.classes[top] if below[top] and p64[top] > 0.4 and below.sum() <= 130 else None


def read_review() -> dict[str, str]:
    """What a person decided on the contact sheet: `collection/file` → the right synset, or "" for none."""
    with open(HERE / "reviewed.csv", newline="") as file:
        return {f"{row['collection']}/{row['file']}": row["synset"] for row in csv.DictReader(file)}


def alike(pictures: Tensor) -> Tensor:
    """[N, N] greatest correlation of two pictures at 16 x 16, one of them mirrored or not."""
    small = F.adaptive_avg_pool2d(pictures.float(), 16)
    flat = [
        F.normalize(view.flatten(1) - view.flatten(1).mean(1, keepdim=True))
        for view in (small, small.flip(-1))
    ]
    return torch.maximum(flat[0] @ flat[0].T, flat[1] @ flat[0].T)


def main(work: Path, step: str) -> None:
    """Run `propose` or `build` in the folder `work`."""
    download(work)
    sources = list_sources(work)
    scores = score_sources(sources, work / "scores.pt")
    sources = [sources[index] for index in scores["keep"]]
    (propose if step == "propose" else build)(work, sources, scores)


def propose(work: Path, sources: list[Source], scores: dict) -> None:
    """Write `pictures.csv`: the training and held-out pictures of leaves, and the wide pool for the
    autoencoder.
    """
    hierarchy, review = Hierarchy.imagenet(), read_review()
    p64, p96 = scores["l64"].softmax(1), scores["l96"].softmax(1)
    leaves: dict[str, list[tuple[float, int]]] = {}
    matched = []
    for index, source in enumerate(sources):
        synset = match(source, p64[index].numpy(), p96[index].numpy(), hierarchy)
        if candidate_synsets(source.names, set(hierarchy.all_synsets)):
            matched.append(index)
        synset = review.get(f"{source.collection}/{source.file}", synset)
        if synset:
            leaves.setdefault(synset, []).append((float(p64[index, hierarchy.classes.index(synset)]), index))
    rows, used = [], set()
    for synset, found in sorted(leaves.items()):
        kept: list[tuple[float, int]] = []
        for isp, index in sorted(found, reverse=True):
            if isp > 0.07 and all(alike(scores["P64"][[index, other]])[0, 1] <= 0.97 for _, other in kept):
                kept.append((isp, index))
        part = "held" if synset in HELD_OUT else "train"
        for isp, index in kept[: MOST_PER_SYNSET + (part == "held")]:
            used.add(index)
            rows.append((part, synset, sources[index].collection, sources[index].file, round(isp, 4)))
    rows += [
        ("pool", "", sources[i].collection, sources[i].file, "")
        for i in _pool(matched, used, rows, sources, scores)
    ]
    with open(HERE / "pictures.csv", "w", newline="") as file:
        csv.writer(file).writerows([FIELDS, *rows])


def _pool(matched: list[int], used: set[int], rows: list, sources: list[Source], scores: dict) -> list[int]:
    """Other named pictures, none blank, doubled, or near a held-out concept by name, by the judge or by its
    pixels.
    """
    hierarchy = Hierarchy.imagenet()
    held_classes = [hierarchy.classes.index(synset) for synset in HELD_OUT]
    near = scores["l64"].softmax(1)[:, held_classes].sum(1)
    tiny = F.adaptive_avg_pool2d(scores["P64"].float(), 8).flatten(1)
    contrast = scores["P64"].float().flatten(1).std(1)
    place = {(source.collection, source.file): index for index, source in enumerate(sources)}
    held = tiny[[place[row[2], row[3]] for row in rows if row[0] == "held"]]
    kept, seen = [], set()
    for index in matched:
        key = tuple((tiny[index] / 12).round().int().tolist())
        if index in used or near[index] >= 0.03 or HELD_OUT_WORDS.search(" ".join(sources[index].names)):
            continue
        if contrast[index] >= 20 and key not in seen and (tiny[index] - held).abs().mean(1).min() >= 9:
            seen.add(key)
            kept.append(index)
    return kept


def build(work: Path, sources: list[Source], scores: dict) -> None:
    """Write `work/pictures.pt`: P and P64 uint8 [N, 3, 96|64, …] with `labels`, `pool`, and the held-out
    ones apart.
    """
    place = {(source.collection, source.file): index for index, source in enumerate(sources)}
    with open(HERE / "pictures.csv", newline="") as file:
        rows = list(csv.DictReader(file))

    def indices(part: str) -> list[int]:
        return [place[row["collection"], row["file"]] for row in rows if row["part"] == part]

    train, held, pool = indices("train"), indices("held"), indices("pool")
    tensors = {
        "P": scores["P"][train],
        "P64": scores["P64"][train],
        "pool": scores["P"][pool],
        "heldP64": scores["P64"][held],
        "held96": scores["P"][held],
    }
    labels = {
        "labels": [row["synset"] for row in rows if row["part"] == "train"],
        "heldlabels": [row["synset"] for row in rows if row["part"] == "held"],
    }
    torch.save({**tensors, **labels}, work / "pictures.pt")
    print(
        f"{len(train)} pictures of {len(set(labels['labels']))} leaves, "
        f"{len(held)} held out, {len(pool)} more in the pool"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("propose", "build"))
    parser.add_argument("--work", type=Path, default=WORK)
    options = parser.parse_args()
    main(options.work, options.step)

"""CLIP as a judge beyond ImageNet: do the pictures of a synset look like its word, its kind, its siblings?

After "Do I look like a cat.n.01 to you?" (arXiv 2503.10357, section 4.2), with cosines of CLIP vectors:

- lemma similarity: a picture with the text of its synset;
- hypernym similarity: the mean over the synset's direct hypernyms;
- co-hyponym similarity: the mean over the other hyponyms of those;
- specificity: hypernym similarity / co-hyponym similarity, of the synset's means.

`beats` is ours: the share of the co-hyponyms that look less like the picture than its own word does; 1/2 is
chance, whatever the scale of a CLIP's cosines.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2iprobe import wordnet
from t2iprobe.clip import ClipFeatures, clip_hash, load_clip
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.prompts import find_template, render
from t2iprobe.hypernymy.results import read_results
from t2iprobe.intervals import describe_mean
from t2iprobe.pictures import picture_files, read_picture
from t2iprobe.runs import Run
from t2iprobe.spread import describe_ranks
from t2iprobe.storage import hash_files, write_atomically, write_output

__all__ = ["judge_pictures", "list_relatives", "measure_likeness"]

SCHEMA = "t2iprobe.clip_judge/1"
TEXT = "{lemma}"
MEASURES = ("lemma", "hypernym", "cohyponym", "specificity", "beats")

Floats = NDArray[np.floating]


def judge_pictures(
    source: Path,
    judge: str,
    out: Path | None = None,
    *,
    text: str = TEXT,
    device: str = "auto",
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Judge the pictures of a run, or of a folder ``DIR/<synset>/*`` of any WordNet synsets, by a CLIP.

    The pictures' vectors are kept in ``judges/`` of the run (beside `out` for a folder), one file for the
    pictures of a synset, so that a killed judgement goes on. Writes `out` (``judges/<name>.json`` in the run)
    and a CSV beside it. Returns means over synsets with intervals, how they rank synsets beside the run's
    classifiers, and one row a synset. Raises UserError where there are no pictures.
    """
    find_template(text)
    pictures, results = _find_pictures(source)
    name = _name_judge(judge)
    if out is None:
        if results is None:
            raise UserError("say by --out FILE.json where to write what is found of a folder of pictures")
        out = source / "judges" / f"{name}.json"
    store = out.parent / name
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {store}: {error.strerror}") from None
    features = load_clip(judge, device, dtype)
    texts = _Texts(features, text)
    rows = []
    for place, synset in enumerate(sorted(pictures)):
        vectors = _read_vectors(store, synset, pictures[synset], features)
        rows.append({"synset": synset, "samples": len(vectors), **_judge_synset(synset, vectors, texts)})
        if progress is not None:
            progress(place + 1, len(pictures))
    found = _summarise(rows, results) | {"judge": features.name, "hash": clip_hash(judge), "text": text}
    write_output(out.with_suffix(".csv"), _write_csv(rows).encode())
    write_output(out, (json.dumps(found, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode())
    return found


def _name_judge(judge: str) -> str:
    """Return a folder's name for this judge and its very weights."""
    slug = re.sub(r"[^\w.-]+", "-", Path(judge).name if "/" in judge else judge)[:40].strip("-")
    return f"{slug}-{hashlib.sha256(f'{judge} {clip_hash(judge)}'.encode()).hexdigest()[:8]}"


def _find_pictures(source: Path) -> tuple[dict[str, list[Path]], dict[str, Any] | None]:
    """Return synset → pictures, and the results of the run if it is one."""
    if (source / "manifest.json").exists():
        run = Run.open(source)
        found = {name: run.pictures(name) for name in run.manifest["identity"]["synsets"]}
        found = {name: paths for name, paths in found.items() if paths}
        if not found:
            raise UserError(f"{source} keeps no pictures: run it with --keep all or thumbnails")
        return found, read_results(run)
    if not source.is_dir():
        raise UserError(f"there is no run or folder of pictures {source}")
    folders = sorted(path for path in source.iterdir() if path.is_dir() and path.name[0] not in "._")
    found = {}
    for folder in folders:
        if paths := picture_files(folder):
            found.setdefault(wordnet.synset(folder.name).name(), []).extend(paths)
    if not found:
        raise UserError(f"{source} holds no pictures: they are looked for in {source}/<synset>/*")
    return found, None


def _read_vectors(store: Path, synset: str, pictures: Sequence[Path], features: ClipFeatures) -> Floats:
    """Return the pictures' vectors [N, d], from `store` where it holds those of these very pictures."""
    digest = hash_files({str(place): picture for place, picture in enumerate(pictures)}).partition(":")[2]
    path = store / f"{synset.replace('/', '_')}-{digest[:16]}.npy"
    try:
        stored = np.load(path, allow_pickle=False)
        if stored.ndim == 2 and len(stored) == len(pictures):
            return stored
    except (OSError, ValueError, EOFError):
        pass
    vectors = features.pictures([read_picture(picture) for picture in pictures])
    content = io.BytesIO()
    np.save(content, vectors)
    write_atomically(path, content.getvalue())
    return vectors


class _Texts:
    """The vectors of synsets' texts, each computed once."""

    def __init__(self, features: ClipFeatures, template: str) -> None:
        self._features, self._template = features, template
        self._known: dict[str, Floats] = {}

    def vectors(self, names: Sequence[str]) -> Floats:
        """Return [len(names), d] for names of synsets."""
        new = [name for name in dict.fromkeys(names) if name not in self._known]
        if new:
            texts = [render(self._template, wordnet.synset(name)) for name in new]
            self._known |= dict(zip(new, self._features.texts(texts), strict=True))
        return np.stack([self._known[name] for name in names])


def list_relatives(name: str) -> tuple[list[str], list[str]]:
    """Return the direct hypernyms of a synset, and its co-hyponyms: the other hyponyms of those."""
    synset = wordnet.synset(name)
    hypernyms = synset.hypernyms()
    siblings = {other.name() for parent in hypernyms for other in parent.hyponyms()} - {synset.name()}
    return sorted(parent.name() for parent in hypernyms), sorted(siblings)


def _judge_synset(name: str, vectors: Floats, texts: _Texts) -> dict[str, float | None]:
    hypernyms, cohyponyms = list_relatives(name)
    return measure_likeness(
        vectors,
        texts.vectors([name])[0],
        texts.vectors(hypernyms) if hypernyms else None,
        texts.vectors(cohyponyms) if cohyponyms else None,
    )


def measure_likeness(
    pictures: Floats, lemma: Floats, hypernyms: Floats | None, cohyponyms: Floats | None
) -> dict[str, float | None]:
    """Return the measures of a synset from unit vectors: pictures [N, d], lemma [d], others [·, d].

    None where there are no hypernyms or co-hyponyms. Specificity is None where the co-hyponym similarity is
    not positive: the ratio then says nothing.
    """
    own = pictures @ lemma
    above = None if hypernyms is None else float((pictures @ hypernyms.T).mean())
    beside = beats = None
    if cohyponyms is not None:
        others = pictures @ cohyponyms.T
        beside = float(others.mean())
        beats = float(((own[:, None] > others) + 0.5 * (own[:, None] == others)).mean())
    return {
        "lemma": float(own.mean()),
        "hypernym": above,
        "cohyponym": beside,
        "specificity": above / beside if above is not None and beside is not None and beside > 0 else None,
        "beats": beats,
    }


def _summarise(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any] | None) -> dict[str, Any]:
    means = {}
    for measure in MEASURES:
        values = [row[measure] for row in rows if row[measure] is not None]
        means[measure] = (describe_mean(values) if values else {"value": None, "interval": None}) | {
            "synsets": len(values)
        }
    agreement = []
    for name, analysis in (results or {}).get("classifiers", {}).items():
        isp = {row["synset"]: row["isp"] for row in analysis["synsets"]}
        for measure in MEASURES:
            pairs = [
                (isp[row["synset"]], row[measure])
                for row in rows
                if row["synset"] in isp and row[measure] is not None
            ]
            ranks = describe_ranks([x for x, _ in pairs], [y for _, y in pairs])
            agreement.append({"classifier": name, "measure": measure, **ranks})
    return {"schema": SCHEMA, "means": means, "agreement": agreement, "synsets": list(rows)}


def _write_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    target = io.StringIO()
    writer = csv.DictWriter(target, ["synset", "samples", *MEASURES], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue()

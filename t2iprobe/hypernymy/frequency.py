"""Does a model know best the words that its training captions name most often?

As in arXiv 2310.09247, appendix: a caption counts once for a synset whose lemma it names. Where the published
counting had bugs, this differs: a lemma that several synsets share counts for each of them; punctuation does
not hide a word; lemmas of several words are found. `single_word` holds the published choice of synsets.
"""

import csv
import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2iprobe import wordnet
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.captions import read_captions
from t2iprobe.hypernymy.results import read_results
from t2iprobe.runs import Run
from t2iprobe.spread import describe_ranks
from t2iprobe.storage import write_output

__all__ = ["LemmaCounter", "analyse_frequency", "list_lemmas", "write_frequency"]

SCHEMA = "t2iprobe.frequency/1"
METRICS = ("isp", "scs")
_WORD = re.compile(r"[^\W_]+")

Words = tuple[str, ...]


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case; hyphens and apostrophes part words, in lemmas too."""
    return _WORD.findall(text.lower().replace("_", " "))


@functools.lru_cache(maxsize=500_000)
def base_forms(word: str) -> tuple[str, ...]:
    """Return a word and what it may be the plural of, by WordNet's rules (dogs: dogs, dog)."""
    return tuple(dict.fromkeys((word, *wordnet.reader()._morphy(word, "n"))))


def list_lemmas(synsets: Iterable[str], which: str = "first") -> dict[str, list[str]]:
    """Return synset → its lemmas: the `first`, as published, or `all`."""
    if which not in ("first", "all"):
        raise UserError(f"--lemmas takes first or all, not {which!r}")
    names = {name: wordnet.synset(name).lemma_names() for name in synsets}
    return {
        name: [lemma.replace("_", " ") for lemma in (lemmas if which == "all" else lemmas[:1])]
        for name, lemmas in names.items()
    }


class LemmaCounter:
    """Counts, for every synset, the captions that name one of its lemmas, in singular or plural."""

    def __init__(self, lemmas: Mapping[str, Sequence[str]]) -> None:
        self.lemmas = lemmas
        self._owners: dict[Words, set[str]] = {}
        for synset, texts in lemmas.items():
            for text in texts:
                self._owners.setdefault(tuple(split_words(text)), set()).add(synset)
        # Lemmas of several words, by their first.
        self._longer: dict[str, list[Words]] = {}
        for words in self._owners:
            if len(words) > 1:
                self._longer.setdefault(words[0], []).append(words)

    def find(self, caption: str) -> set[str]:
        """Return the synsets that a caption names."""
        words = split_words(caption)
        found: set[str] = set()
        for place, word in enumerate(words):
            for form in base_forms(word):
                found |= self._owners.get((form,), set())
            for lemma in self._longer.get(word, ()):
                end = place + len(lemma) - 1
                if (
                    end < len(words)
                    and tuple(words[place:end]) == lemma[:-1]
                    and lemma[-1] in base_forms(words[end])
                ):
                    found |= self._owners[lemma]
        return found

    def count(self, captions: Iterable[str]) -> tuple[int, dict[str, int]]:
        """Return how many captions there were, and synset → how many of them name it (zeros left out)."""
        total, counts = 0, dict.fromkeys(self.lemmas, 0)
        for caption in captions:
            total += 1
            for synset in self.find(caption):
                counts[synset] += 1
        return total, {synset: count for synset, count in counts.items() if count}


def write_frequency(
    run: Run,
    captions: Sequence[Path],
    out: Path | None = None,
    *,
    column: str | None = None,
    lemmas: str = "first",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Count the run's lemmas in caption files, correlate with ISP and SCS, write JSON and CSV.

    Files that were counted before are not counted again: their counts stand in ``frequency_counts.json`` of
    the run, which is written after each file. Returns the results.
    """
    results = read_results(run)
    found = list_lemmas([row["synset"] for row in results["synsets"]], lemmas)
    total, counts = _count_files(run, captions, found, column, progress)
    analysis = analyse_frequency(results, found, counts) | {
        "captions": total,
        "files": list(map(str, captions)),
    }
    out = out or run.path / "frequency.json"
    write_output(out.with_suffix(".csv"), write_csv(analysis).encode())
    text = json.dumps(analysis, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    write_output(out, text.encode())
    return analysis


def _count_files(
    run: Run,
    paths: Sequence[Path],
    lemmas: Mapping[str, Sequence[str]],
    column: str | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[int, dict[str, int]]:
    for path in paths:
        if not path.is_file():
            raise UserError(f"there is no file of captions {path}")
    key = hashlib.sha256(json.dumps([lemmas, column], sort_keys=True).encode()).hexdigest()
    store = run.path / "frequency_counts.json"
    known = _read_store(store, key)
    counter, total = LemmaCounter(lemmas), 0
    counts = dict.fromkeys(lemmas, 0)
    for place, path in enumerate(paths):
        status = path.stat()
        name = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        if name not in known:
            number, found = counter.count(read_captions(path, column))
            known[name] = {"captions": number, "counts": found}
            write_output(store, json.dumps({"key": key, "files": known}).encode())
        total += known[name]["captions"]
        for synset, count in known[name]["counts"].items():
            counts[synset] += count
        if progress is not None:
            progress(place + 1, len(paths))
    return total, counts


def _read_store(path: Path, key: str) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["files"] if stored["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def analyse_frequency(
    results: Mapping[str, Any], lemmas: Mapping[str, Sequence[str]], counts: Mapping[str, int]
) -> dict[str, Any]:
    """Return the rank correlation of counts with each metric, over all synsets and over one-word lemmas."""
    rows = [
        {
            "synset": row["synset"],
            "lemma": lemmas[row["synset"]][0],
            "captions": counts[row["synset"]],
            **{metric: row[metric] for metric in METRICS},
        }
        for row in results["synsets"]
    ]
    single = [row for row in rows if " " not in row["lemma"]]
    return {
        "schema": SCHEMA,
        "correlation": _correlate(rows),
        "single_word": _correlate(single),
        "never_named": sum(row["captions"] == 0 for row in rows),
        "synsets": rows,
    }


def _correlate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = {}
    for metric in METRICS:
        pairs = [(row["captions"], row[metric]) for row in rows if row[metric] is not None]
        found[metric] = describe_ranks([count for count, _ in pairs], [value for _, value in pairs])
    return found


def write_csv(analysis: Mapping[str, Any]) -> str:
    """Return one row a synset: its lemma, the captions that name it, ISP and SCS."""
    target = io.StringIO()
    writer = csv.DictWriter(target, ["synset", "lemma", "captions", *METRICS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(analysis["synsets"])
    return target.getvalue()

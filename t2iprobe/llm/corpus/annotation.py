"""The stage that annotates: a row's id, its quality signals, its MinHash bands. The text stays as it is."""

import functools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus.captions import compute_caption_signals, load_token_counter
from t2iprobe.llm.corpus.classifiers import ENDINGS, Classifier, load_classifier, score_classifier
from t2iprobe.llm.corpus.documents import Row, number_of
from t2iprobe.llm.corpus.importance import Target, load_target, score_target
from t2iprobe.llm.corpus.minhash import (
    SHINGLE,
    band_rows,
    compute_signatures,
    hash_shingles,
    read_size,
    shingle,
)
from t2iprobe.llm.corpus.nouns import Nouns
from t2iprobe.llm.corpus.signals import (
    Document,
    Rules,
    Signals,
    compute_signals,
    copy_ccnet_signals,
    stop_words,
)
from t2iprobe.llm.corpus.streaming import dump_lines
from t2iprobe.storage import hash_files

_METADATA = ("cc_segment", "cc_net_source", "url", "source_domain", "language", "snapshot_id", "shard_id")


@dataclass(frozen=True)
class Annotation:
    """What is annotated.

    captions: our own signals, too (of English texts). tokenizer: whose tokens are counted (see
    `load_token_counter`), None for no count. size: of a shingle (`minhash.read_size`). targets: files of
    `importance.train_target`, each of which adds three signals, or of fastText, which add one.
    """

    rules: Rules = field(default_factory=Rules)
    captions: bool = True
    tokenizer: str | None = "embedded"
    size: str | int = SHINGLE
    targets: tuple[Path, ...] = ()

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the signals depend on beside the text."""
        targets = [hash_files({"": path}) for path in self.targets]
        return asdict(self) | {"rules": asdict(self.rules), "targets": targets}

    def process(self, rows: Sequence[Row]) -> tuple[list[bytes], Counter[str]]:
        """Return a line for each row."""
        documents = [Document(row.text) for row in rows]
        hashes = [hash_shingles(shingle(document.words, document.text, self.size)) for document in documents]
        signatures = compute_signatures([each for each in hashes if len(each)])
        bands = band_rows(signatures, [bool(len(each)) for each in hashes])
        own = self._caption_signals(rows)
        lines = []
        for row, document, minhash, more in zip(rows, documents, bands, own, strict=True):
            domain = row.fields.get("source_domain")
            signals = copy_ccnet_signals(row.fields, len(row.text))
            signals |= compute_signals(document, self.rules, domain if isinstance(domain, str) else None)
            for path in self.targets:
                signals |= _score(load_any_target(path), document)
            lines.append(
                {
                    "id": row.id,
                    "id_int": number_of(row.id),
                    "metadata": {key: row.fields[key] for key in _METADATA if key in row.fields},
                    "quality_signals": signals | more,
                    "minhash": minhash,
                }
            )
        short = sum(not len(each) for each in hashes)
        return [dump_lines(lines)], Counter(too_short_for_minhash=short)

    def _caption_signals(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        if not self.captions or self.rules.language != "en":
            return [{} for _ in rows]
        nouns, texts = _load_nouns(), [row.text for row in rows]
        tokens: list[int | None] = [None] * len(rows)
        if self.tokenizer is not None:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the threads here
            encoded = load_token_counter(self.tokenizer).encode_batch_fast(texts)
            tokens = [len(each.ids) for each in encoded]
        return [
            compute_caption_signals(text, nouns, count) for text, count in zip(texts, tokens, strict=True)
        ]


def load_any_target(path: Path) -> Target | Classifier:
    """Read a target of `importance.train_target`, or a classifier of fastText."""
    return load_classifier(path) if path.suffix in ENDINGS else load_target(path)


def _score(target: Target | Classifier, document: Document) -> Signals:
    if isinstance(target, Target):
        return score_target(target, document)
    return score_classifier(target, document)


@functools.cache
def _load_nouns() -> Nouns:
    return Nouns(stop_words("en"))


def make_annotation(
    language: str,
    domains: Path | None,
    captions: bool,
    tokenizer: str,
    size: str | int,
    targets: Sequence[Path],
) -> Annotation:
    """Return what a person asked for. Raises UserError for what would fail in mid-file."""
    numbers: dict[str, int] = {}
    if domains is not None:
        try:
            numbers = {str(key): int(value) for key, value in json.loads(domains.read_bytes()).items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"cannot read domain numbers from {domains}: {error}") from None
    counter = None if tokenizer == "none" or not captions else tokenizer
    if counter is not None:
        load_token_counter(counter)
    names = [load_any_target(path).name for path in targets]
    if len(set(names)) < len(names):
        raise UserError(f"two targets have the same name: {', '.join(names)}")
    return Annotation(Rules(language, numbers), captions, counter, read_size(size), tuple(targets))

"""Published classifiers: files of fastText (.bin, .ftz), read by the package fasttext-predict."""

import functools
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus.signals import PRECISION, Document, Signals

ENDINGS = (".bin", ".ftz")
_MAGIC, _SUPERVISED = 793712314, 3
_CRAWLED = "__label__cc"  # what a published classifier calls the texts that are not its target


@dataclass(frozen=True)
class Classifier:
    """A classifier of fastText. name: the file's, which its signal bears."""

    name: str
    model: Any


@functools.cache
def load_classifier(path: Path) -> Classifier:
    """Read a classifier. Raises UserError where the file is none, or the package is not there."""
    name = path.stem
    if not name.isidentifier() or not name.islower():
        raise UserError(
            f"a classifier's file is named by a word in lower case such as wikiref.bin, not {path.name}"
        )
    try:
        from fasttext import load_model
    except ImportError:
        raise UserError(f"{path} is fastText's: pip install 't2iprobe[corpus]' reads it") from None
    try:
        check_file(path)
        model = load_model(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the classifier {path}: {error}") from None
    return Classifier(name, model)


def check_file(path: Path) -> None:
    """Raise ValueError for what is no whole classifier: of a file cut off fastText reads on for ever."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            magic, kind = (struct.unpack_from("<i", content, place)[0] for place in (0, 36))
            if (magic, kind) != (_MAGIC, _SUPERVISED):
                raise ValueError("it is no classifier of fastText")
            entries, _, _, _, pruned = struct.unpack_from("<3i2q", content, 64)
            place = 92
            for _ in range(entries):  # each a word, a zero, its count and kind
                if (end := content.find(b"\0", place)) < 0:
                    raise ValueError("it is cut off")
                place = end + 10
            place += 8 * max(pruned, 0)
            (quantized,) = struct.unpack_from("<?", content, place)
            place = _skip_matrix(content, place + 1, quantized)
            (output_too,) = struct.unpack_from("<?", content, place)
            place = _skip_matrix(content, place + 1, quantized and output_too)
            if place != len(content):
                raise ValueError(f"it has {len(content)} bytes instead of {place}")
    except struct.error:
        raise ValueError("it is cut off") from None


def _skip_matrix(content: mmap.mmap, place: int, quantized: bool) -> int:
    if not quantized:
        rows, columns = struct.unpack_from("<2q", content, place)
        return place + 16 + 4 * rows * columns
    with_norms, rows, _, codes = struct.unpack_from("<?2qi", content, place)
    place = _skip_quantizer(content, place + 21 + codes)
    return _skip_quantizer(content, place + rows) if with_norms else place


def _skip_quantizer(content: mmap.mmap, place: int) -> int:
    (size,) = struct.unpack_from("<i", content, place)
    return place + 16 + 4 * 256 * size  # 256 centroids


def score_classifier(classifier: Classifier, document: Document) -> Signals:
    """Return the published signal: the probability of the first label, or of not being crawled."""
    text, score = " ".join(document.text.splitlines()).strip(), None
    if document.text:
        labels, probabilities = classifier.model.predict(text)
        if labels:
            score = 1 - probabilities[0] if labels[0] == _CRAWLED else probabilities[0]
            score = round(float(score), PRECISION)
    return {f"rps_doc_ml_{classifier.name}_score": [[0, len(document.text), score]]}

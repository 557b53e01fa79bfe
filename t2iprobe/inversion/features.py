"""Picture features: how alike two pictures are, and with CLIP how well a picture fits a text."""

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from scipy.special import softmax

from t2iprobe import clip
from t2iprobe.classifiers import EMBEDDED, load_classifier
from t2iprobe.clip import ClipFeatures, normalise
from t2iprobe.devices import resolve_device
from t2iprobe.errors import UserError
from t2iprobe.pages import name_classifier

if TYPE_CHECKING:
    from t2iprobe.classifiers import Classifier

__all__ = ["FORMS", "ClassifierFeatures", "ClipFeatures", "Features", "load_features", "normalise"]

#: ``NAME:FILE`` of the CLIP that `auto` takes.
VARIABLE = "T2IPROBE_CLIP"
FORMS = f"'auto', 'classifier', {clip.FORMS}"
BATCH = 32


class Features(Protocol):
    """Whatever turns pictures into vectors whose cosine says how alike they are."""

    name: str

    def pictures(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 [n, d] of unit length for pictures uint8 [H, W, 3]."""
        ...

    def texts(self, texts: Sequence[str]) -> np.ndarray | None:
        """Return float32 [n, d] of unit length that compare with pictures, None where there are none."""
        ...


class ClassifierFeatures:
    """What the last layer of the packaged classifier reads: no network and no package more, but no texts."""

    def __init__(self, classifier: "Classifier") -> None:
        self.name = name_classifier(classifier.name)
        self.classifier = classifier

    def pictures(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 [n, d] of unit length for pictures uint8 [H, W, 3]."""
        return normalise(self._in_batches(self.classifier.features, pictures))

    def texts(self, texts: Sequence[str]) -> None:
        """Return None: a classifier reads no text."""
        return None

    def probabilities(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Return the probability float32 [n, C] of each class for pictures uint8 [H, W, 3]."""
        return softmax(self._in_batches(self.classifier.score, pictures), axis=1)

    def _in_batches(
        self, judge: Callable[[Sequence[np.ndarray]], np.ndarray], pictures: Sequence[np.ndarray]
    ) -> np.ndarray:
        return np.concatenate([judge(pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)])


def load_features(spec: str = "auto", device: str = "auto", dtype: str = "float32") -> Features:
    """Load picture features by `spec`, one of FORMS.

    `auto` takes the packaged classifier; where open_clip is installed and the environment variable
    T2IPROBE_CLIP names a network and its weights file (``NAME:FILE``), that. The file of OpenAI's own weights
    belongs to the network ``ViT-B-32-quickgelu``. Raises UserError where the features cannot be had.
    """
    device = resolve_device(device)
    kind = spec.partition(":")[0]
    if spec == "auto":
        name, _, file = os.environ.get(VARIABLE, "").partition(":")
        if find_spec("open_clip") and Path(file).is_file():
            return clip.load_clip(f"clip:{name}:{file}", device, dtype)
    if spec in ("auto", "classifier"):
        return ClassifierFeatures(load_classifier(EMBEDDED, device=device, dtype=dtype))
    if kind != "clip":
        raise UserError(f"there are no features {spec!r}: use {FORMS}")
    return clip.load_clip(spec, device, dtype)

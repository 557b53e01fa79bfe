"""Scorers: pictures → logits over the classes of a hierarchy."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from t2iprobe.classifiers import (
    FORMS,
    Classifier,
    lite_weights,
    load_classifier,
    make_preprocess,
)
from t2iprobe.classifiers import classifier_hash as scorer_hash
from t2iprobe.errors import UserError

__all__ = ["FORMS", "Scorer", "lite_weights", "load_scorer", "make_preprocess", "scorer_hash"]


class Scorer(Protocol):
    """Whatever judges pictures."""

    name: str
    classes: int

    def score(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Return logits float32 [n, C] for pictures uint8 [H, W, 3]."""
        ...


def load_scorer(
    spec: str, *, device: str | None = None, dtype: str = "auto", classes: int = 1000
) -> Classifier:
    """Load a classifier by `spec`: one of FORMS.

    Raises UserError where it cannot be found, or has another number of classes than `classes`.
    """
    classifier = load_classifier(spec, device=device, dtype=dtype)
    if classifier.classes != classes:
        raise UserError(
            f"the classifier {spec!r} has {classifier.classes} classes, the hierarchy {classes}: "
            "take one with ImageNet-1k labels, or name its classes by --hierarchy FILE.csv"
        )
    return classifier

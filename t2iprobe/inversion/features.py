"""Picture features: how alike two pictures are, and with CLIP how well a picture fits a text."""

import logging
import os
import pickle
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy.special import softmax

from t2iprobe.classifiers import EMBEDDED, load_classifier
from t2iprobe.devices import inference_context, resolve_device
from t2iprobe.errors import UserError, suggest
from t2iprobe.pages import name_classifier

if TYPE_CHECKING:
    from t2iprobe.classifiers import Classifier

#: The published metric's network (arXiv 2302.04841).
CLIP_NAME, CLIP_WEIGHTS = "ViT-B-32", "openai"
#: ``NAME:FILE`` of the CLIP that `auto` takes.
VARIABLE = "T2IPROBE_CLIP"
FORMS = "'auto', 'classifier', 'clip', 'clip:NAME:TAG' or 'clip:NAME:FILE'"
BATCH = 32
# What open_clip was seen to raise for files of other networks, damaged ones, and without a network.
_LOAD_ERRORS = (
    *(OSError, RuntimeError, ValueError, KeyError, AssertionError, AttributeError, TypeError),
    pickle.UnpicklingError,
)


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


class ClipFeatures:
    """A CLIP of open_clip, with its own preprocessing, in float32."""

    def __init__(self, name: str, weights: str, device: str, dtype: str) -> None:
        self.name = f"CLIP {name} ({Path(weights).name})"
        self._device, self._dtype = device, dtype
        self._network, self._preprocess, self._tokenize = _load_clip(name, weights, device)

    def pictures(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 [n, d] of unit length for pictures uint8 [H, W, 3]."""
        import torch
        from PIL import Image

        inputs = torch.stack([self._preprocess(Image.fromarray(picture)) for picture in pictures])
        return self._encode(self._network.encode_image, inputs)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 [n, d] of unit length, which compare with pictures."""
        return self._encode(self._network.encode_text, self._tokenize(list(texts)))

    def _encode(self, encode: Any, inputs: Any) -> np.ndarray:
        with inference_context(self._device, self._dtype):
            encoded = [encode(batch.to(self._device)).float().cpu().numpy() for batch in inputs.split(BATCH)]
        return normalise(np.concatenate(encoded))


def load_features(spec: str = "auto", device: str = "auto", dtype: str = "float32") -> Features:
    """Load picture features by `spec`, one of FORMS.

    `auto` takes the packaged classifier; where open_clip is installed and the environment variable
    T2IPROBE_CLIP names a network and its weights file (``NAME:FILE``), that. The file of OpenAI's own weights
    belongs to the network ``ViT-B-32-quickgelu``. Raises UserError where the features cannot be had.
    """
    device = resolve_device(device)
    kind, _, rest = spec.partition(":")
    if spec == "auto":
        name, _, file = os.environ.get(VARIABLE, "").partition(":")
        if find_spec("open_clip") and Path(file).is_file():
            return ClipFeatures(name, file, device, dtype)
    if spec in ("auto", "classifier"):
        return ClassifierFeatures(load_classifier(EMBEDDED, device=device, dtype=dtype))
    if kind != "clip":
        raise UserError(f"there are no features {spec!r}: use {FORMS}")
    name, _, weights = rest.partition(":")
    return ClipFeatures(name or CLIP_NAME, weights or CLIP_WEIGHTS, device, dtype)


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Return vectors [n, d] as float32 of unit length; a zero vector stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def _load_clip(name: str, weights: str, device: str) -> tuple[Any, Any, Any]:
    """Return a CLIP's network, its transform of a Pillow picture, and its tokenizer."""
    try:
        import open_clip
    except ModuleNotFoundError:
        raise UserError("CLIP features need open_clip: pip install 't2iprobe[clip]'") from None
    known = open_clip.list_models()
    if name not in known:
        raise UserError(f"open_clip has no network {name!r}{suggest(name, known)}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights not in tags and not Path(weights).is_file():
        raise UserError(
            f"there is no weights file {weights}, nor has open_clip such weights of {name}"
            f"{suggest(weights, tags) or ': it has ' + (', '.join(tags) or 'none')}"
        )
    before = logging.root.manager.disable
    logging.disable()  # open_clip tells of each of its attempts
    try:
        network, preprocess = open_clip.create_model_from_pretrained(name, pretrained=weights, device=device)
    except _LOAD_ERRORS as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        hint = "" if Path(weights).is_file() else f": without a network, give clip:{name}:FILE"
        raise UserError(f"cannot load {weights} into CLIP {name} ({reason}){hint}") from None
    finally:
        logging.disable(before)
    return network.eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(name)

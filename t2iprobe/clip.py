"""CLIP: pictures and texts as vectors that compare, by open_clip or from a folder of transformers."""

import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe.devices import inference_context, resolve_device
from t2iprobe.errors import UserError, suggest
from t2iprobe.storage import hash_files

__all__ = ["FORMS", "ClipFeatures", "clip_hash", "load_clip", "normalise", "pooled"]

#: The published metric's network (arXiv 2302.04841).
CLIP_NAME, CLIP_WEIGHTS = "ViT-B-32", "openai"
FORMS = "'clip', 'clip:NAME:TAG', 'clip:NAME:FILE' or 'clip:FOLDER'"
BATCH = 32
# What open_clip was seen to raise for files of other networks, damaged ones, and without a network.
_LOAD_ERRORS = (
    *(OSError, RuntimeError, ValueError, KeyError, AssertionError, AttributeError, TypeError),
    pickle.UnpicklingError,
)

Encode = Callable[[Any], Any]


class ClipFeatures:
    """A CLIP with its own preprocessing: vectors of unit length, whose cosine says how well two fit."""

    def __init__(
        self,
        name: str,
        encode_pictures: Callable[[Sequence[np.ndarray]], Any],
        encode_texts: Callable[[Sequence[str]], Any],
        device: str,
        dtype: str,
    ) -> None:
        """Take two functions from a batch to a tensor [n, d]."""
        self.name = name
        self._device, self._dtype = device, dtype
        self._encode_pictures, self._encode_texts = encode_pictures, encode_texts

    def pictures(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 [n, d] of unit length for pictures uint8 [H, W, 3]."""
        return self._encode(self._encode_pictures, pictures)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 [n, d] of unit length, which compare with pictures."""
        return self._encode(self._encode_texts, texts)

    def _encode(self, encode: Encode, inputs: Sequence[Any]) -> np.ndarray:
        with inference_context(self._device, self._dtype):
            encoded = [
                encode(list(inputs[start : start + BATCH])).float().cpu().numpy()
                for start in range(0, len(inputs), BATCH)
            ]
        return normalise(np.concatenate(encoded))


def load_clip(spec: str, device: str = "auto", dtype: str = "float32") -> ClipFeatures:
    """Load a CLIP by `spec`: one of FORMS, a folder being what transformers' save_pretrained wrote.

    The file of OpenAI's own weights belongs to the network ``ViT-B-32-quickgelu``. Raises UserError where it
    cannot be had.
    """
    kind, _, rest = spec.partition(":")
    if kind != "clip":
        raise UserError(f"there is no CLIP {spec!r}: use {FORMS}")
    device = resolve_device(device)
    if (Path(rest) / "config.json").is_file():
        return _load_folder(Path(rest), device, dtype)
    if rest and Path(rest).is_dir():
        raise UserError(f"{rest} is no CLIP of transformers: it has no config.json")
    name, _, weights = rest.partition(":")
    return _load_open_clip(name or CLIP_NAME, weights or CLIP_WEIGHTS, device, dtype)


def clip_hash(spec: str) -> str:
    """Hash a CLIP's files where they are at hand, else return its name online."""
    rest = spec.partition(":")[2]
    if rest and Path(rest).is_dir():
        return hash_files({path.name: path for path in Path(rest).iterdir() if path.is_file()})
    name, _, weights = rest.partition(":")
    return hash_files({name: Path(weights)}) if weights and Path(weights).is_file() else f"name:{spec}"


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Return vectors [n, d] as float32 of unit length; a zero vector stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def _load_open_clip(name: str, weights: str, device: str, dtype: str) -> ClipFeatures:
    import torch
    from PIL import Image

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
    network = network.eval().requires_grad_(False)
    tokenize = open_clip.get_tokenizer(name)

    def encode_pictures(pictures: Sequence[np.ndarray]) -> Any:
        inputs = torch.stack([preprocess(Image.fromarray(picture)) for picture in pictures])
        return network.encode_image(inputs.to(device))

    def encode_texts(texts: Sequence[str]) -> Any:
        return network.encode_text(tokenize(list(texts)).to(device))

    label = f"CLIP {name} ({Path(weights).name})"
    return ClipFeatures(label, encode_pictures, encode_texts, device, dtype)


def _load_folder(folder: Path, device: str, dtype: str) -> ClipFeatures:
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # of loading, which takes no time
    try:
        network: Any = AutoModel.from_pretrained(str(folder), local_files_only=True)
        processor: Any = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    except _LOAD_ERRORS as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"cannot load the CLIP in {folder} ({reason})") from None
    finally:
        transformers_logging.enable_progress_bar()
    if not (hasattr(network, "get_image_features") and hasattr(network, "get_text_features")):
        raise UserError(
            f"{folder} holds a {type(network).__name__}, which does not compare pictures and texts"
        )
    network = network.eval().requires_grad_(False).to(device)

    def encode_pictures(pictures: Sequence[np.ndarray]) -> Any:
        # PIL, since an array with few rows would be taken for one with its channels first.
        from PIL import Image

        inputs = processor(images=[Image.fromarray(one) for one in pictures], return_tensors="pt").to(device)
        return pooled(network.get_image_features(**inputs))

    def encode_texts(texts: Sequence[str]) -> Any:
        inputs = processor(text=list(texts), return_tensors="pt", padding=True, truncation=True).to(device)
        return pooled(network.get_text_features(**inputs))

    return ClipFeatures(f"CLIP {folder.name}", encode_pictures, encode_texts, device, dtype)


def pooled(output: Any) -> Any:
    """Return the vectors in what a transformers CLIP's get_image_features or get_text_features returns."""
    return getattr(output, "pooler_output", output)  # transformers 5 returns a record, 4 returned the tensor

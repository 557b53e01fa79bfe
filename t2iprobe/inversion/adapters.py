"""Adapters in and out: Custom Diffusion's keys and values, LoRA as diffusers and as kohya name it."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2iprobe.errors import UserError
from t2iprobe.inversion.weight_files import (
    CUSTOM_DIFFUSION_NAME,
    KINDS,
    LORA_WEIGHT,
    WeightFile,
    list_dtypes,
    read_weights,
    write_safetensors,
)

_SIDES = {"A": "down", "B": "up"}
_KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
_CUSTOM = re.compile(r"(?P<module>.+)\.processor\.to_(?P<part>\w+?)_custom_diffusion\..*")
_ADAPTER_METADATA = "lora_adapter_metadata"
# The width of a base model's text, as its cross-attention takes it.
_CROSS_ATTENTION = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    2048: "SDXL",
    1280: "LDM text-to-image",
    192: "embedded",
}


def write_custom_diffusion(
    folder: str | Path,
    weights: Mapping[str, tuple[Tensor, Tensor]],
    processors: Iterable[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write keys and values, module path → (to_k, to_v) [out, in], for diffusers' ``unet.load_attn_procs``.

    That loader wants an entry for every attention of the UNet; an empty one stands for those that are left
    as they are. `processors` names them all (``unet.attn_processors``); without it, the ``attn1`` beside
    each ``attn2`` of `weights`. Returns the file, which
    ``pipe.unet.load_attn_procs(folder, weight_name="…", _pipeline=pipe)`` loads: without `_pipeline`
    diffusers 0.42 reads it and changes nothing.
    """
    if processors is None:
        processors = [f"{re.sub('attn2$', 'attn1', path)}.processor" for path in weights]
    content = {name: torch.empty(0) for name in processors}
    for module, pair in weights.items():
        content.pop(f"{module}.processor", None)
        for part, weight in zip("kv", pair, strict=True):
            content[f"{module}.processor.to_{part}_custom_diffusion.weight"] = (
                weight.detach().cpu().contiguous()
            )
    path = Path(folder) / CUSTOM_DIFFUSION_NAME
    write_safetensors(path, content, metadata or {})
    return path


def read_custom_diffusion(path: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read module path → (to_k, to_v) [out, in] of a Custom Diffusion file, or of the one in a folder.

    Raises UserError where it is none, is damaged, or trains more than keys and values.
    """
    path = Path(path)
    return _parse_custom_diffusion(read_weights(path / CUSTOM_DIFFUSION_NAME if path.is_dir() else path))


def _parse_custom_diffusion(file: WeightFile) -> dict[str, tuple[Tensor, Tensor]]:
    if file.kind != "custom-diffusion":
        raise UserError(f"{file.path} holds {KINDS[file.kind]}, no Custom Diffusion weights")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, weight in file.content.items():
        if len(weight):  # an empty entry is an attention that is left as it is
            match = _CUSTOM.fullmatch(name)
            parts.setdefault(match["module"] if match else name, {})[match["part"] if match else name] = (
                weight
            )
    for module, found in parts.items():
        if set(found) != {"k", "v"}:
            raise UserError(
                f"{file.path} trains {', '.join(sorted(found))} of {module}: only k and v can be loaded"
            )
    return {module: (found["k"], found["v"]) for module, found in parts.items()}


@torch.no_grad()
def load_custom_diffusion(denoiser: torch.nn.Module, weights: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put keys and values, module path → (to_k, to_v), into a denoiser's own attention, in place.

    Raises UserError, before anything is changed, where a module is missing or has another shape.
    """
    modules = dict(denoiser.named_modules())
    pairs = []
    for path, pair in weights.items():
        for part, weight in zip(("to_k", "to_v"), pair, strict=True):
            layer = getattr(modules.get(path), part, None)
            if layer is None or layer.weight.shape != weight.shape:
                has = f"has {list(layer.weight.shape)}" if layer is not None else "has none"
                raise UserError(
                    f"weights of another model: {path}.{part} is {list(weight.shape)}, this model {has}"
                )
            pairs.append((layer.weight, weight))
    for target, weight in pairs:
        target.copy_(weight)


def write_kohya_lora(file: WeightFile, target: Path) -> Path:
    """Write diffusers' LoRA weights under kohya's names, with the scale (alpha) of each module."""
    if target.suffix != ".safetensors":
        raise UserError(
            f"the form kohya is a .safetensors file: call it {target.with_suffix('.safetensors')}"
        )
    alphas = _find_alphas(file)
    content: dict[str, Tensor] = {}
    for name, weight in file.content.items():
        match = LORA_WEIGHT.fullmatch(name)
        assert match  # by _find_kind
        if match["scaled"]:
            continue
        component, _, module = match["module"].partition(".")
        if component not in _KOHYA_PREFIXES:
            raise UserError(
                f"{file.path} cannot be written as kohya: {name} is not of a UNet or its text encoders "
                "as diffusers names them"
            )
        module = re.sub(r"\bto_out$", "to_out.0", module.replace(".processor.", "."))
        if component != "unet" and not module.startswith("text_model."):
            module = f"text_model.{module}"  # transformers 5 has dropped it from its modules' names
        prefix = _KOHYA_PREFIXES[component]
        if component == "text_encoder" and any(other.startswith("text_encoder_2.") for other in file.content):
            prefix = "lora_te1"
        base = f"{prefix}_{module.replace('.', '_')}"
        side = _SIDES.get(match["side"], match["side"])
        content[f"{base}.lora_{side}.weight"] = weight.contiguous()
        if side == "down":
            content[f"{base}.alpha"] = torch.tensor(alphas.pop(match["module"]))
    if alphas:
        raise UserError(f"{file.path} cannot be written as kohya: it scales {min(alphas)} without weights")
    ranks = [weight.shape[0] for name, weight in content.items() if ".lora_down." in name]
    spec = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(
            max(float(value) for name, value in content.items() if name.endswith(".alpha"))
        ),
    }
    kept = {name: value for name, value in file.metadata.items() if name != _ADAPTER_METADATA}
    write_safetensors(target, content, {**kept, **spec})
    return target


def _find_alphas(file: WeightFile) -> dict[str, float]:
    """Return module → alpha: alpha / rank times its product counts. Without a word of it, it is the rank.

    It stands beside the weights, or in the PEFT configurations that diffusers notes.
    Raises UserError where these are damaged.
    """
    stored, found = {}, {}
    try:
        noted = json.loads(file.metadata.get(_ADAPTER_METADATA, "{}"))
        for name, weight in file.content.items():
            match = LORA_WEIGHT.fullmatch(name)
            assert match  # by _find_kind
            if match["scaled"]:
                stored[re.sub("[._]lora$", "", match["scaled"])] = float(weight)
            elif _SIDES.get(match["side"], match["side"]) == "down":
                found[match["module"]] = _noted_alpha(noted, match["module"], weight.shape[0])
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise UserError(f"{file.path} is damaged: its {_ADAPTER_METADATA} is none ({error})") from None
    return found | stored


def _noted_alpha(noted: Mapping[str, Any], name: str, rank: int) -> float:
    """Return a module's alpha by its component's configuration, as PEFT reads it."""
    component, _, module = name.partition(".")
    patterns = noted.get(f"{component}.alpha_pattern") or {}
    fitting = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    alpha = patterns.get(next(fitting, None), noted.get(f"{component}.lora_alpha", rank))
    # PEFT then divides by the root of the rank, kohya always by the rank
    return float(alpha) * (math.sqrt(rank) if noted.get(f"{component}.use_rslora") else 1)


def describe_lora(file: WeightFile) -> dict[str, Any]:
    components: dict[str, int] = {}
    ranks, widths = [], set()
    kohya = any(name.startswith("lora_") for name in file.content)
    for name, weight in file.content.items():
        match = LORA_WEIGHT.fullmatch(name)
        assert match  # by _find_kind
        if not match["scaled"] and _SIDES.get(match["side"], match["side"]) == "down":
            ranks.append(weight.shape[0])
            module = match["module"]
            if kohya:
                known = re.match(r"lora_(unet|te\d?|transformer)(?=_)", module)
                component = known[0] if known else "lora"
            else:
                component = module.split(".")[0]
            components[component] = components.get(component, 0) + 1
            if re.search(r"attn2[._](processor\.)?to_k$", module):
                widths.add(weight.shape[1])
    if not ranks:
        raise UserError(f"{file.path} is not a usable LoRA: it has no down (A) matrices")
    return {
        "form": "kohya" if kohya else "diffusers",
        "rank": max(ranks),
        "ranks": sorted(set(ranks)),
        "alpha": sorted(set(_find_alphas(file).values())),
        "modules": len(ranks),
        "components": components,
        "dtype": list_dtypes(weight for name, weight in file.content.items() if not name.endswith(".alpha")),
        "fits": sorted(_CROSS_ATTENTION[width] for width in widths if width in _CROSS_ATTENTION),
    }


def describe_custom_diffusion(file: WeightFile) -> dict[str, Any]:
    weights = _parse_custom_diffusion(file)
    widths = sorted({key.shape[1] for key, _ in weights.values()})
    return {
        "form": "diffusers",
        "modules": sorted(weights),
        "width": widths,
        "dtype": list_dtypes(weight for pair in weights.values() for weight in pair),
        "fits": [_CROSS_ATTENTION[width] for width in widths if width in _CROSS_ATTENTION],
    }

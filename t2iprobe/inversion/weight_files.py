"""Files of weights as they are stored: safetensors, and pickles, of which only the tensors are read."""

import io
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from t2iprobe.errors import UserError
from t2iprobe.storage import write_output

EMBEDDING_NAME = "learned_embeds.safetensors"
LORA_NAME = "pytorch_lora_weights.safetensors"
CUSTOM_DIFFUSION_NAME = "pytorch_custom_diffusion_weights.safetensors"
KINDS = {"lora": "LoRA weights", "custom-diffusion": "Custom Diffusion weights", "embedding": "an embedding"}
# diffusers, PEFT and kohya, old and new.
LORA_WEIGHT = re.compile(
    r"(?P<module>.+?)[._]lora(_linear_layer)?[._](?P<side>down|up|A|B)(\.default)?\.weight|(?P<scaled>.+)\.alpha"
)


@dataclass(frozen=True)
class WeightFile:
    """What a file holds, as it is stored."""

    path: Path
    kind: str  # embedding, lora, custom-diffusion
    content: Any  # name → tensor, or whatever a pickle holds
    metadata: dict[str, str]


def read_weights(path: str | Path) -> WeightFile:
    """Read an embedding, LoRA or Custom Diffusion file, or the first that a folder holds by its usual name.

    Raises UserError where it is missing, damaged, none of these, or a pickle of more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        names = (EMBEDDING_NAME, "learned_embeds.bin", LORA_NAME, CUSTOM_DIFFUSION_NAME)
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            raise UserError(f"{path} holds no {', '.join(names[:-1])} or {names[-1]}: name the file")
        path = found[0]
    try:
        with open(path, "rb") as opened:
            head = opened.read(9)
        file = _read_safetensors(path) if head[8:] == b"{" else _read_pickle(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise UserError(f"cannot read {path}: it is damaged, or no file of weights ({reason})") from None
    if file.kind != "embedding":
        for name, weight in file.content.items():
            _check_weight(path, name, weight)
    return file


def _check_weight(path: Path, name: str, weight: Any) -> None:
    """Raise UserError where a part of an adapter is no matrix, or scale, or entry that is left empty."""
    match = LORA_WEIGHT.fullmatch(name)
    if not isinstance(weight, Tensor):
        fine = weight == {} and not match
    elif match and match["scaled"]:
        fine = weight.numel() == 1
    else:
        fine = weight.ndim > 1 or not (weight.numel() or match)
    if not fine:
        raise UserError(f"{path} is damaged: {name} is no matrix of weights")


def _read_safetensors(path: Path) -> WeightFile:
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        kind = _find_kind(names, path)  # before a checkpoint's gigabytes are read
        return WeightFile(
            path, kind, {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
        )


def _read_pickle(path: Path) -> WeightFile:
    try:
        # the first embeddings ever published hold their rows in a ParameterDict
        with open(path, "rb") as file, torch.serialization.safe_globals([torch.nn.ParameterDict]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"cannot read {path}: its pickle is damaged or holds more than tensors; code in it is never run"
        ) from None
    if isinstance(content, Tensor):
        return WeightFile(path, "embedding", content, {})
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not tensors by their names")
    noted = content.get("metadata")  # ours; A1111's own notes stand beside the rows
    if not isinstance(noted, dict):
        noted = {name: content.get(name) for name in ("step", "sd_checkpoint", "sd_checkpoint_name")}
    metadata = {str(name): str(value) for name, value in noted.items() if isinstance(value, int | str)}
    content = {str(name): value for name, value in content.items()}
    return WeightFile(path, _find_kind(content, path), content, metadata)


def _find_kind(names: Iterable[str], path: Path) -> str:
    names = list(names)
    if not names:
        raise UserError(f"{path} is empty: it holds no tensors")
    if any("custom_diffusion" in name for name in names):
        return "custom-diffusion"
    if all(LORA_WEIGHT.fullmatch(name) for name in names):
        return "lora"
    if any(name.endswith((".weight", ".bias", ".alpha")) for name in names):
        raise UserError(
            f"{path} is neither an embedding nor LoRA or Custom Diffusion weights: it holds {names[0]}"
        )
    return "embedding"


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write safetensors with sorted metadata: the library's own order changes from call to call."""
    content = save(dict(tensors))
    end = 8 + int.from_bytes(content[:8], "little")
    noted = dict(sorted({**metadata, "format": "pt"}.items()))
    header = json.dumps({"__metadata__": noted, **json.loads(content[8:end])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    write_output(path, len(header).to_bytes(8, "little") + header + content[end:])


def pickle_tensors(content: Mapping[str, Any]) -> bytes:
    """Return what ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def list_dtypes(tensors: Iterable[Tensor]) -> str:
    """Return the tensors' dtypes, such as ``float16, float32``."""
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))

"""A model folder → one safetensors file a decoder layer, each read with one run of large, aligned reads.

A packed file is an ordinary safetensors file whose header is padded with spaces to a whole block, so that the
tensors' bytes begin where a disk can be read around the page cache. A killed run is continued: a file tells,
in its own header, what it was made from.
"""

import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save

from t2iprobe.errors import UserError
from t2iprobe.llm.memory.quantization import quantize
from t2iprobe.llm.naming import Naming
from t2iprobe.storage import explain_full_disk, lock_folder, remove_leftovers, write_atomically

BLOCK = 4096  # what direct reads of any common disk are aligned to
INDEX = "index.json"
_WEIGHTS = "model.safetensors"
_FORMAT = 1
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
# The first number in a tensor's name is its layer's: later ones count experts.
_LAYER = re.compile(r"(?P<prefix>.+?)\.(?P<layer>\d+)\.(?P<name>.+)")
# What old checkpoints store beside their weights: causal masks and rotary frequencies, which models compute.
_COMPUTED = re.compile(r".*\b(attn|attention)\.(masked_)?bias|.*\binv_freq")


class Place(NamedTuple):
    """Where a tensor lies in a layer's bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PackedFile:
    """A safetensors file: `nbytes` of tensors from byte `start` on, and their CRC-32."""

    path: Path
    start: int
    nbytes: int
    checksum: int
    layout: dict[str, Place]


@dataclass(frozen=True)
class Packed:
    """A packed model. `prefix` is what its layer list is called in the checkpoint, such as model.layers."""

    folder: Path
    prefix: str
    layers: tuple[PackedFile, ...]
    rest: PackedFile


def view_tensors(layout: Mapping[str, Place], data: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer as views into its bytes, `data` uint8 [nbytes or more]."""
    return {
        name: data[place.offset : place.offset + place.nbytes].view(place.dtype).view(place.shape)
        for name, place in layout.items()
    }


def pack_layers(
    folder: Path, out: Path, dtype: str | None = None, naming: Callable[[], Naming] | None = None
) -> Packed:
    """Write the safetensors model in `folder` to `out` by layer, or open it where that was done.

    With a `dtype` ("float32"), floating-point tensors are cast to it. With a `naming`, layers are written as
    the model holds them, and refused before anything is written where they are not whole; what is no layer
    keeps the checkpoint's names. A run that was killed is continued, and a model that has changed since is
    packed anew. Where another process packs it, that one is waited for. Raises UserError for a model that
    cannot be read.
    """
    weights = _find_tensors(folder)
    model = _identify(folder, weights, dtype, naming is not None)
    if packed := _find_packed(out, model):
        return packed
    with lock_folder(out):
        found = _find_packed(out, model)
        return found or _pack_layers(folder, out, dtype, weights, model, naming and naming())


def _find_packed(out: Path, model: str) -> Packed | None:
    """Open `out` where it holds this model, None where it holds none or another."""
    if not (out / INDEX).exists():
        return None
    packed, packed_model = _open(out)
    return packed if packed_model == model else None


def _pack_layers(
    folder: Path, out: Path, dtype: str | None, weights: Mapping[str, str], model: str, naming: Naming | None
) -> Packed:
    if naming is not None:
        weights = {name: file for name, file in weights.items() if not naming.ignores(name)}
    prefix, layers = _group_by_layer(folder, weights)
    if naming is not None:
        _check_layers(folder, weights, layers, naming)
    (out / INDEX).unlink(missing_ok=True)
    rest = {name: name for name in weights if name not in {old for layer in layers for old in layer.values()}}
    groups = {f"layer_{number:03}.safetensors": layer for number, layer in enumerate(layers)}
    groups["rest.safetensors"] = {new: old for new, old in rest.items() if not _COMPUTED.fullmatch(new)}
    with explain_full_disk(out):
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        files = {}
        for number, (file, names) in enumerate(groups.items()):
            if not _was_packed(out / file, model):
                tensors = _read_tensors(folder, weights, names.values(), dtype)
                if naming is not None and number < len(layers):
                    tensors = naming.convert_layer(number, tensors)
                else:
                    tensors = {new: tensors[old] for new, old in names.items()}
                write_atomically(out / file, _serialize(tensors, model))
            files[file] = (out / file).stat().st_size
        index = {"format": _FORMAT, "model": model, "prefix": prefix, "files": files}
        write_atomically(out / INDEX, json.dumps(index, indent=1).encode())
    return open_packed(out)


def pack_quantized(packed: Packed, out: Path, bits: int = 4, group: int = 64) -> Packed:
    """Write the layers of a packed model to `out` in few bits, or open them where that was done.

    A matrix NAME becomes NAME|0 (and |1, …: its planes of bits), NAME|scale and NAME|minimum; vectors stay as
    they are. What is no layer is left out. A run that was killed is continued, another's is waited for.
    """
    source = _open(packed.folder)[1]
    model = hashlib.sha256(repr([_FORMAT, source, bits, group]).encode()).hexdigest()
    if found := _find_packed(out, model):
        return found
    with lock_folder(out):
        return _find_packed(out, model) or _pack_quantized(packed, out, bits, group, model)


def _pack_quantized(packed: Packed, out: Path, bits: int, group: int, model: str) -> Packed:
    (out / INDEX).unlink(missing_ok=True)
    with explain_full_disk(out):
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        sizes = {}
        for file in (*packed.layers, None):
            name = "rest.safetensors" if file is None else file.path.name
            if not _was_packed(out / name, model):
                tensors = {} if file is None else _quantize_file(file, bits, group)
                write_atomically(out / name, _serialize(tensors, model))
            sizes[name] = (out / name).stat().st_size
        index = {"format": _FORMAT, "model": model, "prefix": packed.prefix, "files": sizes}
        write_atomically(out / INDEX, json.dumps(index, indent=1).encode())
    return open_packed(out)


def _quantize_file(file: PackedFile, bits: int, group: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in view_tensors(file.layout, _read_data(file)).items():
        if tensor.dim() < 2 or not tensor.is_floating_point():
            tensors[name] = tensor
            continue
        held = quantize(tensor.flatten(0, -2), bits, group)
        tensors |= {f"{name}|{number}": plane for number, plane in enumerate(held.planes)}
        tensors |= {f"{name}|scale": held.scale, f"{name}|minimum": held.minimum}
    return tensors


def open_packed(folder: Path) -> Packed:
    """Open what `pack_layers` wrote. Raises UserError, naming the file, for a damaged or truncated one."""
    return _open(folder)[0]


def _open(folder: Path) -> tuple[Packed, str]:
    try:
        index = json.loads((folder / INDEX).read_bytes())
        names, model, prefix = sorted(index["files"]), index["model"], index["prefix"]
        if index["format"] != _FORMAT or names[-1] != "rest.safetensors":
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{folder} holds no packed model: there is no {INDEX}") from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"{folder / INDEX} is damaged: delete the folder, it is made again") from None
    files = []
    for name in names:
        file, made_from = _read_header(folder / name)
        if made_from != model or file.start + file.nbytes != index["files"][name]:
            raise UserError(f"{file.path} has changed: delete {folder}, it is made again")
        files.append(file)
    return Packed(folder, prefix, tuple(files[:-1]), files[-1]), model


def read_rest(packed: Packed) -> dict[str, torch.Tensor]:
    """Read what is no layer (embedding, last norm, head): name in the checkpoint → tensor."""
    return view_tensors(packed.rest.layout, _read_data(packed.rest))


def _read_data(file: PackedFile) -> torch.Tensor:
    """Read a packed file's bytes, uint8 [nbytes], and check them."""
    data = bytearray(file.nbytes)
    try:
        with open(file.path, "rb") as stream:
            stream.seek(file.start)
            stream.readinto(data)
    except OSError as error:
        raise UserError(f"cannot read {file.path}: {error.strerror}") from None
    check_sum(file, zlib.crc32(data))
    return torch.frombuffer(data, dtype=torch.uint8)


def check_sum(file: PackedFile, checksum: int) -> None:
    """Raise UserError where a file's tensors are not the bytes that were packed."""
    if checksum != file.checksum:
        raise UserError(f"{file.path} is damaged: delete {file.path.parent}, it is made again")


def _find_tensors(folder: Path) -> dict[str, str]:
    """Return tensor name → name of its file, for all tensors of the checkpoint in `folder`."""
    index = folder / f"{_WEIGHTS}.index.json"
    try:
        if index.exists():
            return dict(json.loads(index.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index} is damaged: fetch the model again") from None
    if not (folder / _WEIGHTS).exists():
        raise UserError(f"{folder} has no {_WEIGHTS}: save the model with save_pretrained")
    with _opened(folder / _WEIGHTS) as file:
        return dict.fromkeys(file.keys(), _WEIGHTS)


def _opened(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}): fetch the model again") from None


def _identify(folder: Path, weights: Mapping[str, str], dtype: str | None, named: bool) -> str:
    """Hash what the packed files depend on. A model's files are known by size and time, not read."""
    try:
        states = [(name, (folder / name).stat()) for name in sorted(set(weights.values()))]
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}): fetch the model again") from None
    facts = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    text = repr([_FORMAT, dtype, facts, *(["named"] if named else [])])
    return hashlib.sha256(text.encode()).hexdigest()


def _group_by_layer(folder: Path, weights: Mapping[str, str]) -> tuple[str, list[dict[str, str]]]:
    """Return the layer list's prefix and, of each layer, name within it → name in the checkpoint.

    The layer list is the numbered list with the most parameters.
    """
    lists: dict[str, dict[int, dict[str, str]]] = {}
    sizes: dict[str, int] = {}
    files = {name: _opened(folder / name) for name in set(weights.values())}
    for name, file in weights.items():
        match = _LAYER.fullmatch(name)
        if match and not _COMPUTED.fullmatch(name):
            layers = lists.setdefault(match["prefix"], {})
            layers.setdefault(int(match["layer"]), {})[match["name"]] = name
            size = math.prod(_slice(files[file], name, folder / file).get_shape())
            sizes[match["prefix"]] = sizes.get(match["prefix"], 0) + size
    if not lists:
        raise UserError(f"the model in {folder} has no numbered layers: it is no decoder")
    prefix = max(sizes, key=lambda each: sizes[each])
    layers = lists[prefix]
    if missing := set(range(max(layers))) - set(layers):
        raise UserError(f"the model in {folder} lacks {prefix}.{min(missing)}: fetch it again")
    return prefix, [layers[number] for number in sorted(layers)]


def _slice(file: Any, name: str, path: Path) -> Any:
    try:
        return file.get_slice(name)
    except safetensors.SafetensorError as error:
        raise UserError(f"cannot read {path} ({error}): fetch the model again") from None


def _read_tensors(
    folder: Path, weights: Mapping[str, str], names: Collection[str], dtype: str | None
) -> dict[str, torch.Tensor]:
    files = {file: _opened(folder / file) for file in {weights[name] for name in names}}
    tensors = {}
    for name in names:
        tensor = _slice(files[weights[name]], name, folder / weights[name])[...]
        cast = dtype is not None and tensor.is_floating_point()
        tensors[name] = tensor.to(getattr(torch, str(dtype))) if cast else tensor
    return tensors


def _check_layers(
    folder: Path, weights: Mapping[str, str], layers: Sequence[Mapping[str, str]], naming: Naming
) -> None:
    """Raise UserError where a layer is not what the model holds, by names and shapes alone."""
    files = {file: _opened(folder / file) for file in set(weights.values())}
    for number, layer in enumerate(layers):
        slices = {old: _slice(files[weights[old]], old, folder / weights[old]) for old in layer.values()}
        empty = {old: torch.empty(each.get_shape(), device="meta") for old, each in slices.items()}
        naming.convert_layer(number, empty)


def _serialize(tensors: Mapping[str, torch.Tensor], model: str) -> bytes:
    """Return a safetensors file whose tensors begin at a whole block."""
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    data = memoryview(raw)[8 + int.from_bytes(raw[:8], "little") :]
    header = json.loads(raw[8 : len(raw) - len(data)])
    header["__metadata__"] = {"model": model, "crc32": str(zlib.crc32(data))}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % BLOCK)
    return b"".join([len(text).to_bytes(8, "little"), text, data])


def _was_packed(path: Path, model: str) -> bool:
    try:
        return path.exists() and _read_header(path)[1] == model
    except UserError:
        return False


def _read_header(path: Path) -> tuple[PackedFile, str]:
    """Return a packed file, and the hash of what it was made from. Raises UserError for a damaged one."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        size, start = path.stat().st_size, 8 + length
        metadata = header.pop("__metadata__")
        layout = {
            name: Place(each["data_offsets"][0], tuple(each["shape"]), _DTYPES[each["dtype"]])
            for name, each in header.items()
        }
        nbytes = max((place.offset + place.nbytes for place in layout.values()), default=0)
        packed = PackedFile(path, start, nbytes, int(metadata["crc32"]), layout)
        model = str(metadata["model"])
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): delete {path.parent}, it is made again"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, MemoryError):
        raise UserError(f"{path} is damaged: delete {path.parent}, it is made again") from None
    if size != start + nbytes:
        raise UserError(
            f"{path} has {size} bytes instead of {start + nbytes}: delete {path.parent}, it is made again"
        )
    return packed, model

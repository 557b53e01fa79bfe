"""Tensors as bytes and back: as they are, as bits, or hidden states in 8 bits."""

import math
from typing import Any

import numpy as np
import torch

__all__ = ["BLOCK", "BrokenFrame", "decode_tensor", "decoded_bytes", "encode_tensor", "round_trip"]

# Numbers of a row that share a step: few, since some of a hidden state's are a thousand times the others.
BLOCK = 64
_DTYPES = {
    **{"float64": torch.float64, "float32": torch.float32, "float16": torch.float16},
    **{"bfloat16": torch.bfloat16, "int64": torch.int64, "bool": torch.bool},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_DIMENSIONS = 4


class BrokenFrame(ValueError):
    """What came over the wire is not what a frame may hold."""


def encode_tensor(tensor: torch.Tensor, eight_bits: bool = False) -> tuple[dict[str, Any], bytes]:
    """Return what a header says of a tensor, and its bytes.

    With `eight_bits` a floating-point tensor [..., width] is sent as one byte a number and a float32 step a
    `BLOCK` of them: off by (greatest absolute value of the block) / 254 at most, and exact for zeros.
    """
    tensor = tensor.detach().cpu().contiguous()
    about: dict[str, Any] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
    if tensor.dtype == torch.bool:
        return about, np.packbits(tensor.numpy().reshape(-1)).tobytes()
    if eight_bits and tensor.is_floating_point() and tensor.numel():
        codes, steps = _to_bytes(tensor)
        return about | {"bits": 8}, codes.numpy().tobytes() + steps.numpy().tobytes()
    return about, tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def decode_tensor(about: Any, data: memoryview) -> tuple[torch.Tensor, int]:
    """Return the tensor that `data` begins with, and how many bytes it took.

    Raises BrokenFrame for a description that does not fit the data; nothing is allocated before it does.
    """
    shape, dtype, bits = _read_about(about)
    count, nbytes = math.prod(shape), _count_bytes(shape, dtype, bits)
    if nbytes > len(data):
        raise BrokenFrame(f"a tensor of {nbytes} bytes in {len(data)}")
    # A copy: the frame's buffer is read-only, and is freed with all its tensors.
    part = bytearray(data[:nbytes])
    if dtype == torch.bool:
        bits_ = np.unpackbits(np.frombuffer(part, np.uint8), count=count).view(np.bool_)
        return torch.from_numpy(bits_).view(shape), nbytes
    if bits == 8:
        return _from_bytes(torch.frombuffer(part, dtype=torch.uint8), shape, dtype), nbytes
    if not count:
        return torch.empty(shape, dtype=dtype), 0
    return torch.frombuffer(part, dtype=dtype).view(shape), nbytes


def decoded_bytes(about: Any) -> int:
    """Return how many bytes the tensor of a description has. Raises BrokenFrame where it has none."""
    shape, dtype, _ = _read_about(about)
    return math.prod(shape) * dtype.itemsize


def _read_about(about: Any) -> tuple[tuple[int, ...], torch.dtype, int | None]:
    try:
        shape, dtype = tuple(about["shape"]), _DTYPES[about["dtype"]]
        bits = about.get("bits")
    except (KeyError, TypeError, AttributeError):
        raise BrokenFrame("a tensor without shape or of an unknown dtype") from None
    sizes_are_counts = all(type(size) is int and 0 <= size < 2**40 for size in shape)
    if len(shape) > _MOST_DIMENSIONS or not sizes_are_counts or bits not in (None, 8):
        raise BrokenFrame("a tensor of an impossible shape")
    if bits == 8 and not (dtype.is_floating_point and math.prod(shape)):
        raise BrokenFrame("8 bits of what is no hidden state")
    return shape, dtype, bits


def round_trip(tensor: torch.Tensor) -> torch.Tensor:
    """Return what the other side gets of a tensor [..., width] that is sent in 8 bits."""
    return decode_tensor(*_with_view(encode_tensor(tensor, eight_bits=True)))[0]


def _with_view(encoded: tuple[dict[str, Any], bytes]) -> tuple[dict[str, Any], memoryview]:
    return encoded[0], memoryview(encoded[1])


def _count_bytes(shape: tuple[int, ...], dtype: torch.dtype, bits: int | None) -> int:
    count = math.prod(shape)
    if dtype == torch.bool:
        return -(-count // 8)
    if bits == 8:
        return count + 4 * (count // shape[-1]) * -(-shape[-1] // BLOCK) if shape else 5
    return count * dtype.itemsize


def _to_bytes(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes int8 [rows, width] and steps float32 [rows, blocks]."""
    width = tensor.shape[-1] if tensor.ndim else 1
    rows = tensor.reshape(-1, width).float()
    blocks = torch.nn.functional.pad(rows, (0, -width % BLOCK)).view(len(rows), -1, BLOCK)
    steps = blocks.abs().amax(2, keepdim=True) / 127
    codes = (blocks / torch.where(steps > 0, steps, 1.0)).round_().clamp_(-127, 127).to(torch.int8)
    return codes.view(len(rows), -1)[:, :width].contiguous(), steps[:, :, 0].contiguous()


def _from_bytes(data: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count, width = math.prod(shape), shape[-1] if shape else 1
    codes = data[:count].view(torch.int8).view(-1, width)
    steps = data[count:].clone().view(torch.float32).view(len(codes), -1)
    values = codes.float() * steps.repeat_interleave(BLOCK, dim=1)[:, :width]
    return values.to(dtype).view(shape)

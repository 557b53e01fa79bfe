"""Weights in 2, 3, 4 or 8 bits: groups of rows, each with its own least value and step (FlexGen, section 4).

A group is `group` rows of one column, so that its scales lie beside each other like the columns, and a whole
row is written back with two vector operations.
"""

from dataclasses import dataclass, replace

import torch

from t2iprobe.errors import UserError

# Codes are stored as planes of bits that divide a byte.
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
# Weights that are dequantised together: on a CPU, as many as its cache holds.
_TOGETHER = {"cpu": 1 << 17}
_TOGETHER_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Quantized:
    """A matrix in few bits: weight = minimum + scale · code.

    planes: of each plane of bits, uint8 [groups, bytes a column, columns]; scale and minimum: float32
    [groups, 1, columns]; shape and dtype: the tensor's own. The rows are padded to whole groups.
    """

    planes: tuple[torch.Tensor, ...]
    scale: torch.Tensor
    minimum: torch.Tensor
    bits: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(each.nbytes for each in (*self.planes, self.scale, self.minimum))

    def pin_memory(self) -> "Quantized":
        """Return the same in page-locked memory, from which a GPU reads faster."""
        return replace(
            self,
            planes=tuple(plane.pin_memory() for plane in self.planes),
            scale=self.scale.pin_memory(),
            minimum=self.minimum.pin_memory(),
        )


def quantize(tensor: torch.Tensor, bits: int, group: int = 64) -> Quantized:
    """Return `tensor` [rows, …] in `bits` bits: off by (max − min) / (2 (2^bits − 1)) of its group at most.

    Raises UserError for a number of bits that there is not, ValueError for a tensor of fewer dimensions than
    2 or a group that is no multiple of 8.
    """
    if bits not in _PLANES:
        raise UserError(f"weights cannot be held in {bits} bits: choose 2, 3, 4 or 8")
    if tensor.dim() < 2 or group % 8:
        raise ValueError(f"cannot quantise {tuple(tensor.shape)} in groups of {group}")
    rows = tensor.detach().flatten(1).float()
    padding = rows[-1:].expand(-len(rows) % group, -1)
    groups = torch.cat([rows, padding]).view(-1, group, rows.shape[1])
    minimum, maximum = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (maximum - minimum) / (2**bits - 1)
    steps = torch.where(scale > 0, scale, 1.0)
    codes = ((groups - minimum) / steps).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    planes, shift = [], 0
    for width in _PLANES[bits]:
        planes.append(_pack((codes >> shift) & (2**width - 1), width))
        shift += width
    return Quantized(tuple(planes), scale, minimum, bits, tuple(tensor.shape), tensor.dtype)


def dequantize(quantized: Quantized, out: torch.Tensor) -> None:
    """Write the matrix to `out` [*shape], of any floating-point dtype, on any device."""
    groups, _, columns = quantized.scale.shape
    rows = out.view(out.shape[0], columns)
    group = quantized.planes[0].shape[1] * 8 // _PLANES[quantized.bits][0]
    together = _TOGETHER.get(out.device.type, _TOGETHER_ELSEWHERE)
    step = min(groups, max(1, together // (group * columns)))
    codes = torch.empty(step, group, columns, dtype=torch.uint8, device=out.device)
    floats = torch.empty(step, group, columns, dtype=torch.float32, device=out.device)
    for first in range(0, groups, step):
        last = min(first + step, groups)
        *planes, scale, minimum = (
            part[first:last].to(out.device, non_blocking=True)
            for part in (*quantized.planes, quantized.scale, quantized.minimum)
        )
        _unpack(planes, quantized.bits, codes[: last - first])
        target = rows[first * group : last * group]
        # Straight into `out` where it can hold the whole groups, as floats.
        in_place = out.dtype == torch.float32 and len(target) == (last - first) * group
        values = target.view(-1, group, columns) if in_place else floats[: last - first]
        values.copy_(codes[: last - first])
        torch.addcmul(minimum, values, scale, out=values)
        if not in_place:
            target.copy_(values.view(-1, columns)[: len(target)])


def _pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Pack uint8 [groups, rows, columns], each below 2^width, into [groups, rows · width / 8, columns]."""
    parts = codes.unflatten(1, (8 // width, -1))
    packed = parts[:, 0].clone()
    for part in range(1, 8 // width):
        packed |= parts[:, part] << part * width
    return packed


def _unpack(planes: list[torch.Tensor], bits: int, codes: torch.Tensor) -> None:
    """Undo `_pack` of all planes into `codes` uint8 [groups, rows, columns]."""
    shift = 0
    for plane, width in zip(planes, _PLANES[bits], strict=True):
        parts = codes.unflatten(1, (8 // width, -1))
        for part in range(8 // width):
            values = (plane >> part * width) & (2**width - 1)
            if shift:
                parts[:, part] |= values << shift
            else:
                parts[:, part] = values
        shift += width

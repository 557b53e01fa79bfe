"""Weights in 2, 3, 4 or 8 bits: groups of rows, each with its own least value and step (FlexGen, section 4).

A group is `group` rows of one column, so that its scales lie beside each other like the columns, and a whole
row is written back with two vector operations.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from t2iprobe.errors import UserError

# Codes are stored as planes of bits that divide a byte.
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
# Weights that are dequantised together: on a CPU, as many as its cache holds.
_TOGETHER = 1 << 18
_TOGETHER_ON_GPU = 1 << 24


@dataclass(frozen=True)
class Quantized:
    """A matrix in few bits: weight = minimum + scale · code.

    planes: of each plane of bits, uint8 [groups, bytes a column, columns]; scale and minimum: float32
    [groups, 1, columns]. The rows are padded to whole groups.
    """

    planes: tuple[torch.Tensor, ...]
    scale: torch.Tensor
    minimum: torch.Tensor
    bits: int
    group: int

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
    return Quantized(tuple(planes), scale, minimum, bits, group)


def count_planes(bits: int) -> int:
    """Return in how many planes numbers of that many bits are held."""
    return len(_PLANES[bits])


def dequantize(quantized: Quantized, out: torch.Tensor) -> None:
    """Write the matrix to `out` [*shape], of any floating-point dtype, on any device."""
    groups, _, columns = quantized.scale.shape
    rows = out.view(out.shape[0], columns)
    group = quantized.group
    on_cpu = out.device.type == "cpu"
    step = min(groups, max(1, (_TOGETHER if on_cpu else _TOGETHER_ON_GPU) // (group * columns)))
    codes = torch.empty(step, group, columns, dtype=torch.uint8, device=out.device)
    floats = torch.empty(step, group, columns, dtype=torch.float32, device=out.device)
    for first in range(0, groups, step):
        last = min(first + step, groups)
        target = rows[first * group : last * group]
        # Straight into `out` where it can hold the whole groups, as floats.
        in_place = out.dtype == torch.float32 and len(target) == (last - first) * group
        values = target.view(-1, group, columns) if in_place else floats[: last - first]
        parts = [
            part[first:last].to(out.device, non_blocking=True)
            for part in (*quantized.planes, quantized.scale, quantized.minimum)
        ]
        arrays = [codes[: last - first], values, *parts]
        # numpy computes with one thread: torch would take those that a pass computes with, and wait for them.
        _restore(quantized.bits, *([array.numpy() for array in arrays] if on_cpu else arrays))
        if not in_place:
            target.copy_(values.view(-1, columns)[: len(target)])


def _pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Pack uint8 [groups, rows, columns], each below 2^width, into [groups, rows · width / 8, columns]."""
    parts = codes.unflatten(1, (8 // width, -1))
    packed = parts[:, 0].clone()
    for part in range(1, 8 // width):
        packed |= parts[:, part] << part * width
    return packed


def _restore(bits: int, codes: Any, values: Any, *parts: Any) -> None:
    """Write minimum + scale · code to `values`; `parts`: planes, scale, minimum. All are numpy, or torch."""
    *planes, scale, minimum = parts
    shift = 0
    for plane, width in zip(planes, _PLANES[bits], strict=True):
        rows = plane.shape[1]
        for part in range(8 // width):
            some = codes[:, part * rows : (part + 1) * rows]
            if shift:
                some |= ((plane >> part * width) & (2**width - 1)) << shift
            else:
                some[...] = (plane >> part * width) & (2**width - 1)
        shift += width
    values[...] = codes
    values *= scale
    values += minimum


def row_bytes(width: int, group: int = 64) -> int:
    """Return the bytes of a row of `width` numbers in 4 bits: half a byte a number, 8 bytes a group."""
    return -(-width // group) * (group // 2 + 8)


def quantize_rows(rows: torch.Tensor, group: int = 64) -> torch.Tensor:
    """Return rows [N, width] in 4 bits, uint8 [N, `row_bytes`(width)], each row complete in itself.

    A group is `group` numbers beside each other in a row; the last one is filled up with the row's last
    number. Off by (max − min) / 30 of its group at most (FlexGen, section 4); a constant group is exact.
    Each row holds codes, then steps, then least values, the last two as float32.
    """
    count, width = rows.shape
    rows = rows.float()
    if lacking := -width % group:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, lacking)], 1)
    groups = rows.reshape(count, -1, group)
    minimum, maximum = groups.aminmax(dim=2, keepdim=True)
    step = (maximum - minimum) / 15
    codes = ((groups - minimum) / torch.where(step > 0, step, 1.0)).round_().clamp_(0, 15).to(torch.uint8)
    packed = codes[:, :, : group // 2] | codes[:, :, group // 2 :] << 4
    scales = torch.cat([step, minimum], 2).transpose(1, 2).reshape(count, -1)
    return torch.cat([packed.view(count, -1), scales.contiguous().view(torch.uint8)], 1)


def dequantize_rows(held: torch.Tensor, width: int, group: int = 64) -> torch.Tensor:
    """Return what `quantize_rows` made, as float32 [N, width]."""
    count, groups = len(held), -(-width // group)
    codes = held[:, : groups * group // 2].view(count, groups, group // 2)
    scales = held[:, groups * group // 2 :].contiguous().view(torch.float32).view(count, 2, groups, 1)
    values = torch.empty(count, groups, group, device=held.device)
    values[:, :, : group // 2] = codes & 15
    values[:, :, group // 2 :] = codes >> 4
    values.mul_(scales[:, 0]).add_(scales[:, 1])
    return values.view(count, -1)[:, :width]

import numpy as np
import pytest
import torch

from t2iprobe.errors import UserError
from t2iprobe.llm.memory.quantization import dequantize, quantize

SHAPES = [(64, 5), (128, 48), (130, 7), (3, 11), (70, 2, 3), (1, 1), (700, 600)]


def restore(tensor: torch.Tensor, bits: int, group: int = 64) -> torch.Tensor:
    out = torch.full_like(tensor, torch.nan)
    dequantize(quantize(tensor, bits, group), out)
    return out


def group_by_hand(tensor: torch.Tensor, group: int) -> list[np.ndarray]:
    """The values of each group: `group` rows of a column."""
    matrix = tensor.flatten(1).double().numpy()
    return [part for column in matrix.T for part in np.split(column, range(group, len(column), group))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_weight_is_off_by_more_than_half_a_step_of_its_group(bits: int, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    tensor[0] *= 30  # groups of very different ranges
    restored = restore(tensor, bits)
    for old, new in zip(group_by_hand(tensor, 64), group_by_hand(restored, 64), strict=True):
        step = (old.max() - old.min()) / (2**bits - 1)
        assert np.abs(new - old).max() <= step / 2 + 1e-6 * np.abs(old).max()
        assert len(np.unique(new)) <= 2**bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_lies_on_the_grid_comes_back(bits: int) -> None:
    codes = torch.randint(2**bits, (128, 10), generator=torch.Generator().manual_seed(0))
    codes[::64], codes[1::64] = 0, 2**bits - 1
    tensor = codes * 0.25 - 3
    assert torch.equal(restore(tensor, bits), tensor)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("value", [0.0, -3.25, 1e-42, 65000.0])
def test_constant_groups_come_back(bits: int, value: float) -> None:
    assert torch.equal(restore(torch.full((64, 3), value), bits), torch.full((64, 3), value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_the_rounded_floats(dtype: torch.dtype) -> None:
    tensor = torch.randn(200, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(restore(tensor, 4), restore(tensor.float(), 4).to(dtype))


@pytest.mark.parametrize(("bits", "expected"), [(2, 2), (3, 3), (4, 4), (8, 8)])
def test_it_takes_as_few_bytes_as_told(bits: int, expected: int) -> None:
    # Beside the codes, two floats a group: 1 bit a weight in groups of 64, 4 in groups of 16.
    tensor = torch.randn(1536, 576)
    assert quantize(tensor, bits).nbytes * 8 == tensor.numel() * (expected + 1)
    assert quantize(tensor, bits, group=16).nbytes * 8 == tensor.numel() * (expected + 4)


def test_smaller_groups_are_nearer() -> None:
    tensor = torch.randn(256, 100, generator=torch.Generator().manual_seed(0))
    errors = [(restore(tensor, 4, group) - tensor).square().mean() for group in (16, 64, 256)]
    assert errors == sorted(errors)


def test_only_the_given_tensor_is_written() -> None:
    tensor = torch.randn(130, 7)
    memory = torch.full((132, 7), torch.nan)
    dequantize(quantize(tensor, 4), memory[1:131])
    assert memory[[0, -1]].isnan().all()
    assert not memory[1:131].isnan().any()


def test_what_cannot_be_quantised() -> None:
    with pytest.raises(UserError, match="cannot be held in 5 bits: choose 2, 3, 4 or 8"):
        quantize(torch.zeros(4, 4), 5)
    with pytest.raises(ValueError, match="cannot quantise"):
        quantize(torch.zeros(4), 4)
    with pytest.raises(ValueError, match="groups of 12"):
        quantize(torch.zeros(4, 4), 4, group=12)

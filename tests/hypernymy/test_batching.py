"""Batch sizes: searched by what batches take, bounded by memory, halved when it runs out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from t2iprobe.errors import UserError
from t2iprobe.hypernymy.batching import FIRST, MOST, SHARE, BatchSizes, ProcessMemory
from t2iprobe.hypernymy.sampling import DiffusersSampler
from t2iprobe.pipelines import place_pipeline
from t2iprobe.runs import build_plan
from t2iprobe.testing import tiny_pipeline

PLAN = build_plan([{"samples": 8, "prompts": {"dog.n.01": {"base": "a dog"}}}], 0)


class MadeUpMemory:
    """A device of `total` bytes where a picture takes `each`, beside `weights`."""

    def __init__(self, total: int, weights: int, each: int) -> None:
        self.total, self.weights, self.each = total, weights, each
        self.peak = weights

    def draw(self, size: int) -> None:
        self.peak = max(self.peak, self.weights + size * self.each)
        assert self.peak <= self.total

    def peak_bytes(self) -> int:
        return self.peak

    def free_bytes(self) -> int:
        return self.total - self.weights

    def used_bytes(self) -> int:
        return self.weights

    def reset(self) -> None:
        self.peak = self.weights


def search(sizes: BatchSizes, memory: MadeUpMemory | None = None, overhead: float = 1.0) -> list[int]:
    """Draw until the size is settled, where a batch takes `overhead` and 0.1 a picture; returns the sizes."""
    drawn = []
    for _ in range(40):
        size = sizes.next(10_000)
        drawn.append(size)
        if memory is not None:
            memory.draw(size)
        sizes.learn(size, overhead + 0.1 * size)
        if sizes.settled:
            return [*drawn, sizes.next(10_000)]
    raise AssertionError(drawn)


def test_sizes_double_while_that_pays() -> None:
    assert search(BatchSizes())[-1] == MOST
    assert search(BatchSizes(), overhead=0.05)[-1] == 16  # a picture takes 0.1063 at 8, 0.1031 at 16: enough
    assert search(BatchSizes(), overhead=0.0) == [FIRST, FIRST, 2 * FIRST, 2 * FIRST, FIRST]


@pytest.mark.parametrize("total", [30, 60, 130, 1000, 10_000])
def test_no_batch_is_begun_that_would_not_fit(total: int) -> None:
    memory = MadeUpMemory(total, 10, 5)
    last = search(BatchSizes(memory=memory), memory)[-1]
    assert last * 5 <= total - 10
    assert last == MOST or 2 * last * 5 > SHARE * (total - 10)


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("left", [1, 5, 31, 32, 96, 100])
def test_a_fixed_size_stays_and_pictures_are_shared_fairly(left: int, lanes: int) -> None:
    sizes = BatchSizes(16, lanes=lanes)
    sizes.learn(16, 1.0)
    drawn: list[int] = []
    while sum(drawn) < left:
        drawn.append(sizes.next(left - sum(drawn)))
    assert sum(drawn) == left
    assert max(drawn) <= 16
    assert max(drawn) - min(drawn) <= 1
    rounds = -(-left // (16 * lanes))
    assert len(drawn) == min(left, lanes * rounds)


def test_memory_that_ran_out_bounds_the_sizes_for_good() -> None:
    sizes = BatchSizes(16)
    sizes.shrink(16)
    assert sizes.next(100) == 8
    sizes.shrink(16)  # told by another thread
    assert sizes.next(100) == 8
    for _ in range(9):
        sizes.shrink(sizes.next(100))
    assert sizes.next(100) == 1


def test_the_process_knows_its_memory() -> None:
    memory = ProcessMemory()
    memory.reset()
    before = memory.used_bytes()
    block = np.ones(200 << 20, np.uint8)
    del block
    assert (memory.peak_bytes() or 0) - before > 150 << 20
    assert memory.free_bytes() > 0


def make_sampler(dtype: str = "bfloat16") -> DiffusersSampler:
    pipeline = tiny_pipeline()
    place_pipeline(pipeline, "cpu", dtype)
    return DiffusersSampler(pipeline, steps=2, guidance=3.0, dtype=dtype)


def limit_rows(sampler: DiffusersSampler, rows: int) -> list[int]:
    """Let the denoiser run out of memory above so many rows, as torch does; returns the rows it was given."""
    seen: list[int] = []

    def check(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(len(inputs[0]))
        if len(inputs[0]) > rows:
            torch.empty(1 << 60, dtype=torch.uint8)  # raises torch's own error

    sampler.pipeline.unet.register_forward_pre_hook(check)
    return seen


def test_a_batch_that_does_not_fit_is_drawn_in_halves() -> None:
    expected = make_sampler().sample(PLAN)
    sampler = make_sampler()
    rows = limit_rows(sampler, 6)  # three pictures, with and without the prompt

    drawn = sampler.sample(PLAN)

    assert [picture is not None for picture in drawn] == [True] * 8
    assert np.abs(np.stack(drawn).astype(int) - np.stack(expected)).max() <= 2  # type: ignore[arg-type]
    assert max(rows) == 16
    assert rows[-1] == 4
    assert sampler.sizes.next(100) == 2


def test_a_picture_that_does_not_fit_is_told() -> None:
    sampler = make_sampler()
    limit_rows(sampler, 1)
    with pytest.raises(UserError, match="not even one picture fits the memory of cpu") as raised:
        sampler.sample(PLAN)
    assert "\n" not in str(raised.value)


def test_other_errors_are_not_taken_for_memory(tmp_path: Path) -> None:
    sampler = make_sampler()

    def fail(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    sampler.pipeline.unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mat1"):
        sampler.sample(PLAN)

"""What does not fit is done in parts, or told in one line."""

from collections.abc import Sequence

import pytest
import torch

from t2iprobe.errors import UserError
from t2iprobe.inversion.memory import in_batches


def make_work(room: int, sizes: list[int]):
    def work(part: Sequence[int]) -> list[int]:
        sizes.append(len(part))
        if len(part) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return [2 * item for item in part]

    return work


@pytest.mark.parametrize(
    ("room", "sizes"), [(16, [16, 4]), (9, [16, 8, 8, 4]), (3, [16, 8, 4, *[2] * 10]), (1, None)]
)
def test_batches_are_halved_until_they_fit_and_stay_so(room: int, sizes: list[int] | None) -> None:
    tried: list[int] = []
    assert in_batches(make_work(room, tried), range(20), 16, "cpu", "a picture") == list(range(0, 40, 2))
    assert tried == (sizes or [16, 8, 4, 2, *[1] * 20])


def test_what_does_not_fit_alone_is_told_in_one_line() -> None:
    message = r"a picture does not fit the memory of cpu \(CUDA out of memory\.\): lower size"
    with pytest.raises(UserError, match=message) as told:
        in_batches(make_work(0, []), range(3), 2, "cpu", "a picture")
    assert "\n" not in str(told.value)


def test_another_error_stays_what_it_is() -> None:
    def work(_: Sequence[int]) -> list[int]:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        in_batches(work, range(3), 2, "cpu", "a picture")

"""Work done in smaller parts where the memory is too small, refused in one line where not even one fits."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from t2iprobe.devices import is_out_of_memory, release_memory
from t2iprobe.errors import UserError
from t2iprobe.pipelines import first_line

T = TypeVar("T")
R = TypeVar("R")


class TooLarge(UserError):
    """What does not fit the memory of a device, and what to do about it."""


@contextmanager
def explain_lack_of_memory(device: object, what: str, advice: str) -> Iterator[None]:
    """Raise TooLarge, with `advice`, where torch finds no memory for `what`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TooLarge(
            f"{what} does not fit the memory of {device} ({first_line(error)}): {advice}"
        ) from None


def in_batches(
    work: Callable[[Sequence[T]], list[R]], items: Sequence[T], batch: int, device: object, what: str
) -> list[R]:
    """Return all that `work` makes of up to `batch` items at a time, of half as many where they do not fit.

    Raises TooLarge where not even one, which is called `what`, fits.
    """
    made: list[R] = []
    start = 0
    while start < len(items):
        part = items[start : start + batch]
        try:
            with explain_lack_of_memory(device, what, "lower size (--set size=…), or take a larger device"):
                made += work(part)
            start += len(part)
            continue
        except TooLarge:
            if len(part) == 1:
                raise
        # Out here nothing holds on to what the failed batch took.
        release_memory(str(device))
        batch = -(-len(part) // 2)
    return made

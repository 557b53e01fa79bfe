"""Who has how much of which memory: what is not in the budget is refused before it is allocated."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from t2iprobe.errors import UserError

__all__ = ["Ledger", "allocator_losses"]

# What the C library's allocator loses between the blocks that it hands out: some MB, measured.
_LOST = 16 << 20


def allocator_losses(budget: int) -> int:
    """Return the bytes of a memory budget that nothing is planned for: what the allocator loses."""
    return min(_LOST, budget // 8)


class Ledger:
    """Budgets in bytes by tier (device, ram, disk), and by name what was taken of them.

    A tier without a budget has no limit. `peak` is tier → the most bytes that were taken at once.
    """

    def __init__(self, budgets: Mapping[str, int | None] | None = None) -> None:
        self.budgets = {tier: nbytes for tier, nbytes in (budgets or {}).items() if nbytes is not None}
        self.peak: dict[str, int] = {}
        self._taken: dict[str, dict[str, int]] = {}
        self._most: dict[str, dict[str, int]] = {}
        self._lock = threading.Lock()  # a thread that reads ahead takes, too

    def take(self, tier: str, name: str, nbytes: int) -> None:
        """Take bytes, beside what has that name already. Raises UserError, telling who has what."""
        with self._lock:
            taken = self._taken.setdefault(tier, {})
            total = sum(taken.values()) + nbytes
            budget = self.budgets.get(tier)
            if budget is not None and total > budget:
                has = ", ".join(f"{each} {size}" for each, size in taken.items() if size) or "nothing yet"
                raise UserError(
                    f"{name} needs {nbytes} bytes and the {tier} budget of {budget} has "
                    f"{budget - total + nbytes} left ({has}): give {total} or more, or write smaller blocks"
                )
            taken[name] = taken.get(name, 0) + nbytes
            self.peak[tier] = max(self.peak.get(tier, 0), total)
            most = self._most.setdefault(tier, {})
            most[name] = max(most.get(name, 0), taken[name])

    def give(self, tier: str, name: str, nbytes: int) -> None:
        """Give bytes back. Raises ValueError for more than the name has."""
        with self._lock:
            has = self._taken.get(tier, {}).get(name, 0)
            if nbytes > has:
                raise ValueError(f"{name} has {has} bytes of {tier} and cannot give {nbytes} back")
            self._taken[tier][name] = has - nbytes

    @contextmanager
    def hold(self, tier: str, name: str, nbytes: int) -> Iterator[None]:
        """Take bytes for a while."""
        self.take(tier, name, nbytes)
        try:
            yield
        finally:
            self.give(tier, name, nbytes)

    def left(self, tier: str) -> int | None:
        """Return the bytes that can still be taken, None where there is no limit."""
        with self._lock:
            budget = self.budgets.get(tier)
            return None if budget is None else budget - sum(self._taken.get(tier, {}).values())

    def report(self) -> dict[str, dict[str, int]]:
        """Return tier → name → the most bytes that it had at once."""
        with self._lock:
            return {tier: dict(names) for tier, names in self._most.items()}

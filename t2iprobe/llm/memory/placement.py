"""Where weights, cache and hidden states lie, and how many prompts go through a layer together.

FlexGen, arXiv 2303.06865, section 4: a block of `batches` batches shares each load of a layer.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from t2iprobe.errors import UserError
from t2iprobe.llm.memory.store import spread_evenly

if TYPE_CHECKING:
    from t2iprobe.llm.memory.cost import Costs, Hardware, ModelShape, Workload

__all__ = ["TIERS", "Choice", "Forecast", "Placement", "Realised", "Shares", "choose_placement", "realise"]

TIERS = ("device", "ram", "disk")


@dataclass(frozen=True)
class Shares:
    """Which part of something lies on each tier: 0 or more each, 1 together. Raises UserError otherwise."""

    device: float
    ram: float
    disk: float

    def __post_init__(self) -> None:
        parts = (self.device, self.ram, self.disk)
        if min(parts) < 0 or not math.isclose(sum(parts), 1, abs_tol=1e-6):
            raise UserError(f"shares of device, RAM and disk are 0 or more and 1 together, not {parts}")


@dataclass(frozen=True)
class Placement:
    """How prompts are written in batches under a memory budget. Raises UserError for an empty block.

    batch: prompts of one forward; batches: those that share each load of a layer; weights: shares of the
    layers, by bytes; cache: of the chunks (layer, batch) of keys and values; hidden: of the batches' hidden
    states; cpu_attention: whether attention is computed where the keys and values lie; bits: 4, or None for
    the dtype that is computed in.
    """

    batch: int
    batches: int
    weights: Shares
    cache: Shares
    hidden: Shares
    cpu_attention: bool = False
    weight_bits: int | None = None
    cache_bits: int | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.batches < 1:
            raise UserError(f"a block has 1 batch of 1 prompt or more, not {self.batches} of {self.batch}")

    @property
    def block(self) -> int:
        """Prompts that share each load of a layer."""
        return self.batch * self.batches


@dataclass(frozen=True)
class Forecast:
    """What the cost model says of a placement.

    peak_bytes: tier → bytes at most; binding: what limits it, in words, such as "disk link" or "compute".
    """

    seconds: float
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    peak_bytes: dict[str, int]
    binding: str


@dataclass(frozen=True)
class Realised:
    """A placement in what can be moved: whole layers, chunks (layer, batch) of the cache, whole batches.

    resident: layers on the device; in_ram: layers in RAM, the others are on the disk; shares: what became of
    each of weights, cache and hidden.
    """

    resident: tuple[int, ...]
    in_ram: tuple[int, ...]
    shares: dict[str, Shares]
    layers: int
    batches: int
    chunks: tuple[str, ...]
    hidden: tuple[str, ...]

    def cache_tier(self, layer: int, batch: int) -> str:
        """Return where the keys and values of a layer of a batch lie."""
        return self.chunks[layer * self.batches + batch]

    def hidden_tier(self, batch: int) -> str:
        """Return where a batch's hidden states lie while other batches compute."""
        return self.hidden[batch]


def realise(placement: Placement, layer_bytes: Sequence[int]) -> Realised:
    """Round a placement to what can be moved, spread evenly; never more on a faster tier than was asked."""
    layers, total = len(layer_bytes), sum(layer_bytes)

    def fits(count: int, share: float, among: Sequence[int]) -> bool:
        return sum(layer_bytes[among[i]] for i in spread_evenly(count, len(among))) <= (share + 1e-9) * total

    def choose(share: float, among: Sequence[int]) -> tuple[int, ...]:
        count = max(n for n in range(len(among) + 1) if fits(n, share, among))
        return tuple(among[i] for i in spread_evenly(count, len(among)))

    resident = choose(placement.weights.device, range(layers))
    rest = [layer for layer in range(layers) if layer not in resident]
    in_ram = tuple(rest) if not placement.weights.disk else choose(placement.weights.ram, rest)
    on_device, in_memory = (sum(layer_bytes[layer] for layer in part) / total for part in (resident, in_ram))
    chunks = _spread_tiers(placement.cache, layers * placement.batches)
    hidden = _spread_tiers(placement.hidden, placement.batches)
    shares = {
        "weights": Shares(on_device, in_memory, max(0.0, 1 - on_device - in_memory)),
        "cache": _count_shares(chunks),
        "hidden": _count_shares(hidden),
    }
    return Realised(resident, in_ram, shares, layers, placement.batches, chunks, hidden)


def _spread_tiers(shares: Shares, count: int) -> tuple[str, ...]:
    """Return a tier for each of `count` equal things, the faster tiers rounded down."""
    on_device = int(shares.device * count + 1e-6)
    in_ram = int(shares.ram * count + 1e-6) if shares.disk else count - on_device
    tiers = ["disk"] * count
    for place in spread_evenly(on_device, count):
        tiers[place] = "device"
    rest = [place for place in range(count) if tiers[place] != "device"]
    for place in spread_evenly(in_ram, len(rest)):
        tiers[rest[place]] = "ram"
    return tuple(tiers)


def _count_shares(tiers: Sequence[str]) -> Shares:
    return Shares(*(sum(each == tier for each in tiers) / len(tiers) for tier in TIERS))


# -- choosing ------------------------------------------------------------------------------------------

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MOST = 2048  # prompts of a block, where there are as many
# Of placements this close to the best, the one with the smallest block is chosen.
_SAME = 1e-3
# What the solver takes for equal: a budget is kept to the byte.
_TOLERANCE = 2e-6
_MEMORY = {"device": "device memory", "ram": "RAM", "disk": "disk space"}


@dataclass(frozen=True)
class Choice:
    """The best placement that was found, and what limits it.

    binding: the constraint of the linear program with the largest dual value: relaxed by a tenth, it would
    save the most seconds; saved: constraint → the share of the block's seconds that this saves, by its dual;
    more_memory: factor on the device's budget → tokens a second of the best placement then.
    """

    placement: Placement
    forecast: Forecast
    binding: str
    saved: dict[str, float]
    more_memory: dict[float, float]


def choose_placement(
    shape: "ModelShape",
    hardware: "Hardware",
    workload: "Workload",
    budgets: Mapping[str, int | None],
    *,
    bits: Sequence[int | None] = (None, 4),
    block: int | None = None,
    batch: int | None = None,
    spared: Callable[[int], int] = lambda device: 0,
) -> Choice:
    """Return the placement that writes the most tokens a second within `budgets` (tier → bytes, None: any).

    For each batch, number of batches, bits and place of attention a program in whole numbers (layers, chunks,
    batches) gives the best shares (FlexGen, section 4.3, with nothing left to round). `block` fixes the
    number of batches, `batch` the prompts of one; `bits` are those that weights and cache may be held in. RAM
    is a tier of its own only where the device is another. Of the device's budget, `spared` bytes are planned
    for nothing; they count as used. Raises UserError, with the least that works, for a device budget in which
    nothing fits.
    """
    device = budgets["device"]

    def spare(given: int | None) -> dict[str, int | None]:
        return {**budgets, "device": None if given is None else given - spared(given)}

    search = _Search(shape, hardware, workload, spare(device), tuple(bits), block, batch)
    best = search.run()
    if best is None:
        needed = least = search.least_bytes()
        while least - spared(least) < needed:
            least = needed + spared(least)
        if device is None or device >= least:
            raise UserError(
                f"no batch fits the budgets {dict(budgets)}: give more memory, or more disk space"
            )
        raise UserError(f"the memory budget of {device} bytes is too small for a batch: give {least} or more")
    saved = search.save(best)
    more = {}
    for factor in (1.1, 2.0):
        if device is not None:
            richer = replace(search, budgets=spare(int(device * factor)), found={})
            found = richer.run()
            assert found is not None
            more[factor] = max(best.forecast.tokens_per_second, found.forecast.tokens_per_second)
    binding = max(saved, key=lambda name: saved[name])
    peak = dict(best.forecast.peak_bytes)
    peak["device"] += 0 if device is None else spared(device)
    placed = replace(best.forecast, binding=binding, peak_bytes=peak)
    return Choice(best.placement, placed, binding, saved, more)


@dataclass(frozen=True)
class _Found:
    placement: Placement
    forecast: Forecast
    counts: np.ndarray


@dataclass
class _Search:
    """The search for the best block, and what it found for each it looked at: None where it does not fit."""

    shape: "ModelShape"
    hardware: "Hardware"
    workload: "Workload"
    budgets: dict[str, int | None]
    bits: tuple[int | None, ...]
    block: int | None
    batch: int | None
    found: dict[tuple[Any, ...], _Found | None] = field(default_factory=dict)

    def run(self) -> _Found | None:
        """Return the best block."""
        sizes = [self.batch] if self.batch is not None else [each for each in BATCHES if each <= self._most()]
        # Those first that could be fastest if nothing but the computation took time.
        bounds = {(size, kind): self._bound(size, kind) for size in sizes for kind in self._kinds()}
        for size, kind in sorted(bounds, key=lambda each: -bounds[each]):
            if bounds[size, kind] > self._best_rate():
                self._search_batches(size, kind)
        fits = [found for found in self.found.values() if found is not None]
        rate = self._best_rate() * (1 - _SAME)
        best = (found for found in fits if found.forecast.tokens_per_second >= rate)
        return min(best, key=lambda found: (found.placement.block, found.placement.batches), default=None)

    def least_bytes(self) -> int:
        """Return the device's bytes that the smallest block needs, all else moved away."""
        number = self.block or 1
        totals = (self.shape.layers, self.shape.layers * number, number)
        needs = []
        for kind in self._kinds():
            row = self._costs(self.batch or 1, number, kind).nbytes["device"]
            moved = [min(0.0, row[2 + 2 * part] * totals[part] + row[7 + part]) for part in range(3)]
            needs.append(row[0] + sum(moved))
        return math.ceil(min(needs) * (1 + 2 * _TOLERANCE))

    def save(self, best: _Found) -> dict[str, float]:
        """Return constraint → share of the seconds that a tenth more would save, by the duals."""
        kept = best.placement
        kind = (kept.weight_bits, kept.cache_bits, kept.cpu_attention)
        program = self._program(kept.batch, kept.batches, kind)
        return program.price(best.counts)

    def _most(self) -> int:
        return MOST if self.workload.prompts is None else self.workload.prompts

    def _kinds(self) -> Iterator[tuple[int | None, int | None, bool]]:
        places = (False, True) if self.hardware.ram_attention else (False,)
        return itertools.product(self.bits, self.bits, places)

    def _best_rate(self) -> float:
        return max((each.forecast.tokens_per_second for each in self.found.values() if each), default=0.0)

    def _bound(self, size: int, kind: tuple[Any, ...]) -> float:
        """Return tokens a second if the computation alone took time."""
        two, one = (
            sum(phase.passes * phase.seconds["compute"][0] for phase in costs.phases.values())
            for costs in (self._costs(size, number, kind) for number in (2, 1))
        )
        return size * self.workload.new_tokens / (two - one)  # of one batch more

    def _search_batches(self, size: int, kind: tuple[Any, ...]) -> None:
        """Look at numbers of batches: doubled as long as they fit, then around the best (FlexGen)."""
        if self.block is not None:
            self._look(size, self.block, kind)
            return
        limit = max(1, -(-self._most() // size))
        if self.workload.prompts is not None:  # blocks that are all the same
            for parts in (1, 2, 3, 4):
                self._look(size, -(-limit // parts), kind)
        fits, too_many = 0, None
        number = 1
        while number <= limit:
            if self._look(size, number, kind) is None:
                too_many = number
                break
            fits, number = number, 2 * number
        while too_many is not None and too_many - fits > max(1, fits // 8):
            middle = (fits + too_many) // 2
            if self._look(size, middle, kind) is None:
                too_many = middle
            else:
                fits = middle
        step = fits // 4
        while step:
            best = self._best_batches(size, kind)
            for number in (best - step, best + step):
                if 1 <= number <= limit:
                    self._look(size, number, kind)
            step //= 2

    def _best_batches(self, size: int, kind: tuple[Any, ...]) -> int:
        rates = {
            key[1]: found.forecast.tokens_per_second
            for key, found in self.found.items()
            if found is not None and (key[0], key[2]) == (size, kind)
        }
        return max(rates, key=lambda number: rates[number])

    def _look(self, size: int, number: int, kind: tuple[Any, ...]) -> _Found | None:
        key = (size, number, kind)
        if key not in self.found:
            self.found[key] = self._solve(size, number, kind)
        return self.found[key]

    def _solve(self, size: int, number: int, kind: tuple[Any, ...]) -> _Found | None:
        from t2iprobe.llm.memory.cost import forecast

        counts = self._program(size, number, kind).solve()
        if counts is None:
            return None
        layers, weight_bits, cache_bits, cpu_attention = self.shape.layers, *kind

        def share(total: int, ram: float, disk: float) -> Shares:
            return Shares(*(float(part) / total for part in (total - ram - disk, ram, disk)))

        placement = Placement(
            size,
            number,
            share(layers, *counts[1:3]),
            share(layers * number, *counts[3:5]),
            share(number, *counts[5:7]),
            cpu_attention,
            weight_bits,
            cache_bits,
        )
        return _Found(placement, forecast(self.shape, self.hardware, self.workload, placement), counts)

    def _costs(self, size: int, number: int, kind: tuple[Any, ...]) -> "Costs":
        from t2iprobe.llm.memory.cost import count_costs

        return count_costs(self.shape, self.hardware, self.workload, [size] * number, *kind)

    def _program(self, size: int, number: int, kind: tuple[Any, ...]) -> "_Program":
        has_ram = self.hardware.to_device is not None
        totals = (self.shape.layers, self.shape.layers * number, number)
        return _Program(self._costs(size, number, kind), self.budgets, totals, has_ram)


@dataclass(frozen=True)
class _Program:
    """The linear program of a block: what to move away from the device, for the least seconds.

    Variables are those of the costs' lines without their 1, then the seconds of a pass of each phase. Each
    phase takes as long as the greatest of its lines, each tier holds its line at most.
    """

    costs: "Costs"
    budgets: Mapping[str, int | None]
    totals: tuple[int, int, int]  # layers, chunks, batches
    has_ram: bool

    def solve(self) -> np.ndarray | None:
        """Return the lines' variables of the best placement in whole numbers, None where nothing fits."""
        found = self._solve_program(self._bounds(), whole=True)
        return None if found.x is None else np.abs(np.round(np.append(1.0, found.x[:9])))

    def price(self, counts: np.ndarray) -> dict[str, float]:
        """Return constraint → the share of the seconds that a tenth more of it saves, by its dual value."""
        bounds = self._bounds()
        bounds[6:9] = [(flag, flag) for flag in counts[7:10]]
        found = self._solve_program(bounds, whole=False)
        saved: dict[str, float] = {}
        names, table, limits = self._rows()
        for name, row, limit, dual in zip(names, table, limits, found.ineqlin.marginals, strict=True):
            if name:
                # A line of seconds shrinks as a whole; a budget, which its row counts as 1, grows.
                amount = 1.0 if name in _MEMORY.values() else row[:9] @ found.x[:9] - limit
                saved[name] = saved.get(name, 0.0) + float(-0.1 * dual * amount / found.fun)
        weights, *others = found.x[1:6:2]
        if not any(others):  # the disk is read for weights alone
            saved["disk link"] = saved.get("disk link", 0.0) + saved.pop("cache files")
        if not weights:  # the reader reads from RAM
            saved["link to the device"] += saved.pop("disk link", 0.0)
        return saved

    def _bounds(self) -> list[tuple[float, float | None]]:
        layers, chunks, batches = self.totals
        ram = [total if self.has_ram else 0 for total in self.totals]
        most = [ram[0], layers, ram[1], chunks, ram[2], batches, 1, 1, 1]
        return [(0, each) for each in most] + [(0, None)] * len(self.costs.phases)

    def _rows(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Return each row's name ("" for what binds no one), its coefficients and its limit."""
        names, table, limits = [], [], []
        for place, phase in enumerate(self.costs.phases.values()):
            seconds = [-1.0 if other == place else 0.0 for other in range(len(self.costs.phases))]
            for name, row in phase.seconds.items():
                names.append(name)
                table.append([*row[1:], *seconds])
                limits.append(-row[0])
        none = [0.0] * len(self.costs.phases)
        for tier, row in self.costs.nbytes.items():
            if (budget := self.budgets.get(tier)) is not None:
                size = max(budget, 1)  # so that all rows are of one size
                names.append(_MEMORY[tier])
                table.append([*(row[1:] / size), *none])
                limits.append((budget * (1 - _TOLERANCE) - row[0]) / size)
        for first, flag, total in zip((0, 2, 4), (6, 7, 8), self.totals, strict=True):
            row = np.zeros(9 + len(none))
            row[first : first + 2], row[flag] = 1.0, -total  # nothing moves where the flag is 0
            names.append("")
            table.append(row.tolist())
            limits.append(0.0)
        return names, np.array(table), np.array(limits)

    def _solve_program(self, bounds: list[tuple[float, float | None]], whole: bool) -> Any:
        from scipy.optimize import linprog

        _, table, limits = self._rows()
        phases = list(self.costs.phases.values())
        # Of equally fast placements the one that moves least: a thousandth of what moving takes.
        moved = sum(phase.passes * sum(row[1:] for row in phase.seconds.values()) for phase in phases)
        price = np.append(1e-4 * np.asarray(moved) + 1e-9, [float(phase.passes) for phase in phases])
        return linprog(
            price,
            A_ub=table,
            b_ub=limits,
            bounds=bounds,
            method="highs",
            integrality=[1] * 9 + [0] * len(phases) if whole else None,
            options={"mip_rel_gap": 1e-6} if whole else None,
        )

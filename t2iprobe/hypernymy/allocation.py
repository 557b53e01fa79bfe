"""Where do the next pictures shrink the interval of a mean over synsets most, and when is it narrow enough?

Synsets are strata: each has its own mean and spread, all have the same weight. Drawing in proportion to the
spread gives the narrowest interval (Neyman 1934, JRSS 97: 558-625), but the spread has to be learned from the
pictures. A synset whose first pictures look alike then gets no more of them, and these tend to be those whose
first pictures missed: the plain mean of an adaptive sample leans low, for skewed values by more than its
interval is wide. Three things keep the interval honest.

- *Two halves.* The pictures of a synset belong to two halves. How many a half gets is decided by the first
  pictures of the other half (and by other synsets), never by its own. So the mean of a half is unbiased
  whatever was decided, and so is its variance; the synset's mean is the mean of the two, with equal weights.
- *Stopping by the width alone.* A run ends at the first look whose interval is narrow enough. The rule sees
  variances, not the mean: such a fixed-width interval keeps its coverage as it narrows (Chow & Robbins 1965,
  Annals of Mathematical Statistics 36: 457-462). Looks are few, and at most double the pictures.
- *A rule of three.* Where no picture shows a thing, it may still be in 3/N of them (95 %). No half-width
  below 3 / (synsets × the fewest pictures of any) is believed or reported.

A unit is what one index draws of a synset: one picture for each template. All numbers here are of units.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from t2iprobe.hypernymy.metrics import Floats
from t2iprobe.intervals import LEVEL

FIRST = 2  # the fewest units that have a spread
PILOT = 4  # units of every synset before their numbers may differ: two a half
PILOT_SHARE = 5  # an equal design's number is this many times the pilot's
GROWTH = 2.0  # no look plans more than this many times the units there are
REACH = 1.02  # units of a further look, at least
RULE_OF_THREE = 3.0
LEAST_BEYOND = 0.01  # of a variance, beyond the units that another run shares the noise of

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Against:
    """The run that a mean is compared with, synset by synset.

    Attributes:
        means: [S] its means.
        variances: [S] of these means.
        units: [S] how many units they are of.
        values: [S, M] its units' values where unit i has the prompt and seed of ours, else NaN.
    """

    means: Floats
    variances: Floats
    units: Counts
    values: Floats


@dataclass(frozen=True)
class Look:
    """What was seen at one look: units in all, fewest and most of a synset, the value with its half-width."""

    units: int
    fewest: int
    most: int
    value: float
    half_width: float
    stderr: float


@dataclass
class Halves:
    """Which unit of a synset belongs to which half: owner [S, L] is 0, 1, or −1 where it is not used."""

    values: Floats
    owner: NDArray[np.int8]

    @classmethod
    def split(cls, values: Floats, units: int) -> "Halves":
        """The first units of every synset, in turns."""
        owner = np.full(values.shape, -1, np.int8)
        owner[:, :units] = np.arange(units) % 2
        return cls(values, owner)

    def extend(self, wanted: Counts) -> "Halves":
        """Take on further units until the halves hold `wanted` [2, S]: the first half's first."""
        owner, place = self.owner.copy(), np.arange(self.owner.shape[1])
        start = self.counts.sum(axis=0)
        for half in (0, 1):
            end = start + wanted[half] - self.counts[half]
            owner[(place >= start[:, None]) & (place < end[:, None])] = half
            start = end
        return Halves(self.values, owner)

    @cached_property
    def counts(self) -> Counts:
        """[2, S] units of each half."""
        return np.stack([(self.owner == half).sum(axis=1) for half in (0, 1)])

    @property
    def equal(self) -> bool:
        """Whether all synsets have the same number of units, and the halves but for an odd one."""
        return bool((self.counts == self.counts[:, :1]).all() and np.ptp(self.counts) <= 1)

    @cached_property
    def pooled(self) -> Floats:
        """[S] variance of a unit, from both halves together."""
        inside, units = self.owner >= 0, self.counts.sum(axis=0)
        mean = np.where(inside, self.values, 0.0).sum(axis=1) / units
        return np.where(inside, (self.values - mean[:, None]) ** 2, 0.0).sum(axis=1) / (units - 1)

    @cached_property
    def means(self) -> Floats:
        """[2, S] mean of each half."""
        return self._moments[0]

    @cached_property
    def variances(self) -> Floats:
        """[2, S] variance of a unit, from each half."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[Floats, Floats]:
        means, variances = [], []
        width = int(self.counts.sum(axis=0).max())  # what lies beyond is not used
        values = self.values[:, :width]
        for half in (0, 1):
            inside, count = self.owner[:, :width] == half, self.counts[half]
            mean = np.where(inside, values, 0.0).sum(axis=1) / count
            squares = np.where(inside, (values - mean[:, None]) ** 2, 0.0).sum(axis=1)
            means.append(mean)
            variances.append(squares / np.maximum(count - 1, 1))
        return np.stack(means), np.stack(variances)


@dataclass(frozen=True)
class Estimate:
    """A mean over synsets: its value and half-width, and both synset by synset.

    Attributes:
        means: [S] means of the synsets.
        variances: [S] of these means.
        own: [S] what our pictures add to them; the rest is the other run's.
    """

    value: float
    stderr: float
    half_width: float
    means: Floats
    variances: Floats
    own: Floats


@dataclass
class Course:
    """How far a rule has come with what is stored.

    Attributes:
        looks: made so far.
        wanted: [S] units that the next look needs, or that were used where there is none.
        reason: why it ended: ``reached`` or ``limit``; None where units are missing.
        equal: units that every synset had before their numbers differed.
        estimate: of the last look; None before the first.
        spread: [S] variance of a unit, for what an equal design would need.
        halves: which unit belongs to which half.
    """

    wanted: Counts
    looks: list[Look] = field(default_factory=list)
    reason: str | None = None
    equal: int = 0
    estimate: Estimate | None = None
    spread: Floats | None = None
    halves: Halves | None = None


def follow_mean(
    values: Floats, stored: Counts, limit: int, half_width: float, against: Against | None = None
) -> Course:
    """Follow the rule "until the mean over synsets is known to ± half_width" through what is stored.

    Args:
        values: [S, limit] value of each unit in [0, 1], NaN where it is not stored.
        stored: [S] units stored without a gap.
        limit: units of a synset, at most.
        half_width: of the interval at `LEVEL`.
        against: a run whose mean is subtracted.

    The same values give the same course, however many of them are stored beyond what it needs.
    """
    count = len(values)
    floor = max(PILOT, 2 * int(np.ceil(RULE_OF_THREE / (count * half_width) / 2)))
    course = Course(wanted=np.full(count, min(FIRST, limit)))

    def look() -> bool:
        """Look; whether it is the last time."""
        used, halves = course.wanted, course.halves
        assert halves is not None
        estimate = course.estimate = estimate_mean(halves, against)
        course.spread = halves.pooled if halves.equal else halves.variances.mean(axis=0)
        row = (int(used.sum()), int(used.min()), int(used.max()))
        course.looks.append(Look(*row, estimate.value, estimate.half_width, estimate.stderr))
        if estimate.half_width <= half_width:
            course.reason = "reached"
        elif (used >= limit).all():
            course.reason = "limit"
        return course.reason is not None

    # Equal numbers first: 2, 3, 4, and twice as many as long as a longer pilot pays.
    while True:
        if (stored < course.wanted).any():
            return course
        units = course.equal = int(course.wanted[0])
        halves = course.halves = Halves.split(values, units)
        if look():
            return course
        needed = units * (course.looks[-1].half_width / half_width) ** 2
        if units >= PILOT and 2 * PILOT_SHARE * units > needed and units >= floor:
            break
        course.wanted = np.full(count, min(units + 1 if units < PILOT else 2 * units, limit))
    planned = plan_units(halves, against)
    while True:
        estimate = course.estimate
        assert estimate is not None
        ratio = float(estimate.own.sum() / planned.variances(halves.counts).sum())
        fixed = float((estimate.variances - estimate.own).sum())
        counts = planned.grow(halves.counts, limit, half_width, ratio, fixed)
        course.wanted = counts.sum(axis=0)
        if (stored < course.wanted).any():
            return course
        halves = course.halves = halves.extend(counts)
        if look():
            return course


def estimate_mean(halves: Halves, against: Against | None = None) -> Estimate:
    """The mean over synsets. Where all have the same number, it is the plain one."""
    from scipy import stats

    if halves.equal:
        units = halves.counts.sum(axis=0)
        means = (halves.means * halves.counts).sum(axis=0) / units
        parts, freedom = (halves.pooled / units)[None], units[None] - 1
    else:
        means = halves.means.mean(axis=0)
        parts, freedom = halves.variances / halves.counts / 4, halves.counts - 1
    count, fewest = len(means), int(halves.counts.sum(axis=0).min())
    own = variances = parts.sum(axis=0)
    if against is not None:
        means = means - against.means
        variances = own + against.variances - 2 * _covariances(halves, against)
        parts = np.concatenate([parts, against.variances[None]])
        freedom = np.concatenate([freedom, against.units[None] - 1])
    total = max(float(variances.sum()), 0.0)
    squares = float((parts**2 / np.maximum(freedom, 1)).sum())
    # Welch & Satterthwaite: how sure the variance itself is.
    degrees = float(parts.sum()) ** 2 / squares if squares > 0 else np.inf
    stderr = np.sqrt(total) / count
    half_width = float(stats.t.ppf((1 + LEVEL) / 2, degrees)) * stderr if stderr > 0 else 0.0
    least = RULE_OF_THREE / (count * fewest)
    return Estimate(float(means.mean()), float(stderr), max(half_width, least), means, variances, own)


def _covariances(halves: Halves, against: Against) -> Floats:
    """[S] covariance of our mean with the other run's, where units have the same prompt and seed."""
    total = np.zeros(len(halves.values))
    for half, (count, covariance) in enumerate(_pair_up(halves, against)):
        total += covariance * count / halves.counts[half] / against.units / 2
    return total


def _pair_up(halves: Halves, against: Against) -> Iterator[tuple[Counts, Floats]]:
    """Yield for each half how many of its units [S] have a partner, and the covariance [S] of a pair."""
    length = min(halves.values.shape[1], against.values.shape[1])
    ours, theirs = halves.values[:, :length], against.values[:, :length]
    for half in (0, 1):
        pairs = (halves.owner[:, :length] == half) & ~np.isnan(theirs)
        count = pairs.sum(axis=1)
        mean = [np.where(pairs, values, 0.0).sum(axis=1) / np.maximum(count, 1) for values in (ours, theirs)]
        products = np.where(pairs, (ours - mean[0][:, None]) * (theirs - mean[1][:, None]), 0.0)
        covariance = products.sum(axis=1) / np.maximum(count - 1, 1)
        yield count, np.where(count > 1, covariance, 0.0)


@dataclass(frozen=True)
class Plan:
    """What a further unit is expected to be worth.

    Attributes:
        predicted: [2, S] variance of a unit of each half, as the other half's pilot predicts it.
        paired: [S] units whose noise the other run shares; infinite without another run.
        beyond: what the spread counts for beyond these: a mean of more units shares less with that run's.
    """

    predicted: Floats
    paired: Floats
    beyond: float = 1.0

    def variances(self, counts: Counts) -> Floats:
        """[S] variance of a synset's mean with `counts` [2, S] units."""
        return (self.predicted / counts).sum(axis=0) / 4

    def grow(self, counts: Counts, limit: int, half_width: float, ratio: float, fixed: float) -> Counts:
        """The numbers [2, S] of the next look: just enough by the prediction, or as many as a look may add.

        `ratio` corrects the prediction by what was seen; `fixed` is the variance that no unit takes away.
        """
        from scipy import stats

        spread, own = np.sqrt(self.predicted), self.paired / 2
        caps = np.array([[(limit + 1) // 2], [limit // 2]])
        aim = (half_width * counts.shape[1] / stats.norm.ppf((1 + LEVEL) / 2)) ** 2 - fixed
        most = GROWTH * counts.sum()

        def scale(factor: float) -> Counts:
            wished = factor * spread
            wished = np.where(wished > own, np.maximum(own, self.beyond * wished), wished)
            # The margin keeps a machine's rounding from deciding.
            wanted = np.ceil(wished - 1e-9).clip(max=limit).astype(np.int64)
            return np.maximum(np.minimum(wanted, caps), counts)

        def enough(factor: float) -> bool:
            wanted = scale(factor)
            total = wanted.sum()
            narrow = ratio * self.variances(wanted).sum() <= aim
            return total >= REACH * counts.sum() and (narrow or total >= most)

        highest = caps.max() / max(float(spread[spread > 0].min(initial=1.0)), 1e-6) / self.beyond
        if not enough(highest):
            return np.maximum(np.broadcast_to(caps, counts.shape), counts)
        return scale(_find_least(enough, highest))


def _find_least(enough: Callable[[float], bool], highest: float) -> float:
    """The least factor that is enough, by bisection of its logarithm."""
    low, high = np.log(1e-6), np.log(highest)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(float(np.exp(middle))) else (middle, high)
    return float(np.exp(high))


def plan_units(halves: Halves, against: Against | None = None) -> Plan:
    """Predict the variance of each half of each synset from the pilot of the other half.

    The prediction is the best mix of a constant, the other half's variance, and what its mean m allows,
    m (1 − m): two pictures say little of a spread, but m near 0 says that there is little. The mix is fitted
    over all synsets in both directions, by least squares with weights 1 / prediction², no part negative.

    With another run that shares the noise of N units, the variance of a synset's difference falls with n
    units as v / n up to N, and as (v − 2 c) / n beyond, c the covariance of a pair: c / v is that of all.
    """
    from scipy.optimize import nnls

    paired, beyond = np.full(halves.values.shape[0], np.inf), 1.0
    if against is not None:
        pairs = (~np.isnan(against.values)).sum(axis=1)
        paired = np.where(pairs > 0, pairs, np.inf)
        shared = float(sum(covariance.sum() for _, covariance in _pair_up(halves, against))) / 2
        beyond = np.sqrt(max(1 - 2 * shared / max(float(halves.pooled.sum()), 1e-12), LEAST_BEYOND))
    means, seen = halves.means[::-1], halves.variances[::-1]  # of the other half
    columns = np.stack([np.ones_like(seen), seen, means * (1 - means)], axis=-1).reshape(-1, 3)
    found = halves.variances.ravel()
    average = float(found.mean())
    if average == 0:
        return Plan(np.ones_like(seen), paired, beyond)
    weights = np.ones(len(found))
    for _ in range(4):
        mix, _ = nnls(columns * weights[:, None], found * weights)
        predicted = columns @ mix
        weights = average / (predicted + 0.1 * average)
    return Plan(np.maximum(predicted, 1e-4 * average).reshape(seen.shape), paired, beyond)

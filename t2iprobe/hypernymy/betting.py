"""Is a word unknown? Bets on its pictures, which may be settled whenever one likes.

Who bets against "the mean is at most c" at odds that are fair if it is so cannot expect to win: the wealth of
such a gambler has a mean of at most 1 at any stopping time, so that 1 / wealth is a p value whenever one
looks, and however the decision to draw on was made (Waudby-Smith & Ramdas 2024, JRSS B 86: 1-27). Values in
[0, 1] are all it takes: no normality, no large numbers. The rule of Benjamini & Hochberg on 1 / wealth then
holds the rate of false discoveries, for any dependence (Wang & Ramdas 2022, JRSS B 84: 822-852).

Two bets run for every synset. *Known*: its mean in-subtree probability is above chance. *Unknown*: it is
below `limits`, a share `tolerance` of the way from chance to 1: with .2 and chance near 0, fewer than one
picture in five shows the word.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from t2iprobe.hypernymy.allocation import PILOT, Counts, Course, Look
from t2iprobe.hypernymy.metrics import Floats
from t2iprobe.hypernymy.resampling import benjamini_hochberg

ALPHA = 0.05  # of each of the two lists
# The parts of the wealth, and the share of the largest stake that each bets.
KNOWN_STAKES = ((1 / 4, 0.5), (1 / 4, 0.1), (1 / 4, 0.02), (1 / 4, 0.004))
UNKNOWN_STAKES = ((0.9, 1.0), (0.1, 0.5))
GROWTH = 4  # of n units, a look adds n / 4

Verdicts = NDArray[np.str_]


@dataclass(frozen=True)
class Bets:
    """What the bets came to, [S] each: p = min(1, 1 / wealth), its q, and the verdict in a word."""

    p_known: Floats
    p_unknown: Floats
    q_known: Floats
    q_unknown: Floats
    verdicts: Verdicts


def wealth_above(values: Floats, chance: float) -> float:
    """Wealth after betting that values [N] in [0, 1] have a mean above `chance` > 0."""
    return sum(part * float(np.prod(1 + stake / chance * (values - chance))) for part, stake in KNOWN_STAKES)


def wealth_below(values: Floats, limit: float) -> float:
    """Wealth after betting that values [N] in [0, 1] have a mean below `limit` < 1."""
    return sum(
        part * float(np.prod(1 + stake / (1 - limit) * (limit - values))) for part, stake in UNKNOWN_STAKES
    )


def settle_bets(values: Floats, units: Counts, chances: Floats, limits: Floats) -> Bets:
    """Settle all bets on the first `units` [S] of values [S, L]; a synset of chance 1 is known."""
    p = np.ones((2, len(values)))
    testable = chances < 1
    for s in np.flatnonzero(testable):
        row = values[s, : units[s]]
        p[0, s] = min(1.0, 1 / max(wealth_above(row, chances[s]), 1e-300))
        p[1, s] = min(1.0, 1 / max(wealth_below(row, limits[s]), 1e-300))
    # A synset that cannot be tested is no test; and equal thresholds for both lists, over all that can.
    q_known, q_unknown = (benjamini_hochberg(np.where(testable, each, np.nan)) for each in p)
    known, unknown = ~testable | (q_known <= ALPHA), q_unknown <= ALPHA
    verdicts = np.where(known, "known", np.where(unknown, "unknown", "undecided"))
    return Bets(p[0], p[1], q_known, q_unknown, verdicts)


def find_limits(chances: Floats, tolerance: float) -> Floats:
    """[S] means below which a word is unknown."""
    return chances + tolerance * (1 - chances)


def follow_unknown(
    values: Floats, stored: Counts, limit: int, chances: Floats | None, tolerance: float
) -> tuple[Course, Bets | None]:
    """Follow the rule "until every synset is decided" through what is stored; see `allocation.follow_mean`.

    `chances` [S] come from the pilot units of other synsets; None as long as these are not stored. Both lists
    only grow: wealth that is no longer at stake stays, and the more are listed the lower is the threshold.
    """
    count = len(values)
    units = np.full(count, min(PILOT, limit))
    course, bets = Course(wanted=units, equal=int(units[0])), None
    if chances is None:
        return course, None
    limits = find_limits(chances, tolerance)
    while not (stored < course.wanted).any():
        units = course.wanted
        bets = settle_bets(values, units, chances, limits)
        open_ = bets.verdicts == "undecided"
        decided = float((~open_).mean())
        course.looks.append(
            Look(int(units.sum()), int(units.min()), int(units.max()), decided, np.nan, np.nan)
        )
        if not open_.any():
            course.reason = "reached"
        elif (units[open_] >= limit).all():
            course.reason = "limit"
        if course.reason:
            break
        longest = int(units[open_].max())
        course.wanted = np.where(open_, min(longest + max(1, longest // GROWTH), limit), units)
    return course, bets

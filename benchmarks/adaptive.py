"""Adaptive sampling: does the interval cover under its stopping rule, and how many pictures does it save?

    python benchmarks/adaptive.py [--run RUN] [--runs 1000] [--json FILE]

Each row draws many runs of a known truth and follows `--until "isp ± h"` in each. Truths are made up (in
many synsets few pictures hit, or values lie near 0 and 1), or with --run the pictures of a stored run: its
synsets' in-subtree probabilities, drawn again with replacement, so that their means are the truth. An equal
design is what the usual run does: so many pictures of each synset that the half-width is the same. `plain` is
the mean of all pictures of an adaptive run without the two halves, and how often the same interval covers
around it.

More rows follow `--until "isp - RUN ± h"`: RUN has the same number of pictures of each synset, drawn anew in
each simulated run, by a model that is worse by a known amount; with other noise than ours, or with the same,
where most of its pictures are like ours. In one row RUN drew until its own mean was known: what pictures of
the same noise share is not counted then, and there is no equal design of both (nan).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe.hypernymy.allocation import Against, follow_mean
from t2iprobe.hypernymy.betting import find_limits, follow_unknown
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.metrics import in_subtree_probabilities
from t2iprobe.runs import Run

SYNSETS = 860
Z = 1.959964
PUBLISHED = 32  # pictures of a synset
OTHER = 16  # those of the run that is compared with
ALIKE, LOSS = 0.7, 0.3  # the share of its pictures that are like ours, and what it loses of ISP in the others

Draw = Callable[[np.random.Generator, int], np.ndarray]  # units → values [S, units]
Pair = Callable[[np.random.Generator, int], tuple[np.ndarray, Against]]


def make_beta(means: np.ndarray, share: float) -> Draw:
    """Beta values with these means, and a variance of `share` of what a mean allows."""
    means = np.clip(means, 1e-4, 1 - 1e-4)
    size = 1 / share - 1
    return lambda rng, units: rng.beta((means * size)[:, None], ((1 - means) * size)[:, None],
                                       (len(means), units))  # fmt: skip


def make_hits(rates: np.ndarray) -> Draw:
    """Pictures that show the word (.9) or do not (.001)."""
    return lambda rng, units: np.where(rng.random((len(rates), units)) < rates[:, None], 0.9, 0.001)


def make_stored(pools: list[np.ndarray]) -> Draw:
    """Stored pictures, drawn again."""
    lengths = np.array([len(pool) for pool in pools])
    table = np.zeros((len(pools), lengths.max()))
    for row, pool in zip(table, pools, strict=True):
        row[: len(pool)] = pool
    return lambda rng, units: np.take_along_axis(
        table, (rng.random((len(pools), units)) * lengths[:, None]).astype(int), axis=1
    )


def make_truths(run: Path | None) -> dict[str, tuple[Draw, np.ndarray, np.ndarray, list[float]]]:
    """Name → how to draw, the synsets' means and variances, and the half-widths to ask for."""
    rng = np.random.default_rng(0)
    truths: dict[str, tuple[Draw, np.ndarray, np.ndarray, list[float]]] = {}
    if run is not None:
        stored = Run.open(run)
        hierarchy = Hierarchy.imagenet()
        logits = stored.logits()
        pools = [in_subtree_probabilities(rows, hierarchy.subtree(name)) for name, rows in logits.items()]
        # Drawn again from N pictures, the spread is (N − 1) / N of theirs.
        moments = [np.array([getattr(pool, name)() for pool in pools]) for name in ("mean", "var")]
        fewest = min(map(len, pools))
        name = f"embedded model ({fewest}–{max(map(len, pools))} pictures stored)"
        published = round(Z * float(np.sqrt(moments[1].mean() / len(pools) / PUBLISHED)), 5)
        truths[name] = (make_stored(pools), *moments, [0.005, 0.0025, 0.0015, 0.001, published, 0.0007])
    rates = np.where(rng.random(SYNSETS) < 0.8, rng.uniform(0, 0.05, SYNSETS), rng.uniform(0.1, 0.9, SYNSETS))
    truths["hits: 80 % of words rare"] = (
        make_hits(rates), 0.001 + 0.899 * rates, 0.899**2 * rates * (1 - rates), [0.005]
    )  # fmt: skip
    means = np.clip(rng.beta(0.1, 0.9, SYNSETS), 1e-4, 1 - 1e-4)
    truths["beta, most means near 0"] = (
        make_beta(means, 0.3), means, 0.3 * means * (1 - means), [0.002]
    )  # fmt: skip
    means = np.clip(rng.beta(0.5, 1, SYNSETS), 1e-4, 1 - 1e-4)
    truths["beta, means from 0 to 1"] = (make_beta(means, 0.15), means, 0.15 * means * (1 - means), [0.003])
    few = np.linspace(0.02, 0.9, 40)
    truths["40 words, hits"] = (make_hits(few), 0.001 + 0.899 * few, 0.899**2 * few * (1 - few), [0.02])
    return truths


def make_pair(draw: Draw, *, same_noise: bool, until: float | None = None) -> Pair:
    """Our pictures, and the run of another model to compare with: OTHER of each synset, or ± `until`."""
    most = OTHER if until is None else 4 * OTHER

    def pair(rng: np.random.Generator, units: int) -> tuple[np.ndarray, Against]:
        ours = draw(rng, max(units, most))
        like = ours[:, :most] if same_noise else draw(rng, most)
        others = (1 - LOSS) * draw(rng, most)
        theirs = np.where(rng.random(like.shape) < ALIKE, like, others)
        pairs = theirs if same_noise else np.full_like(theirs, np.nan)
        if until is not None:
            found = follow_mean(theirs, np.full(len(theirs), most), most, until)
            assert found.estimate is not None
            moments = found.estimate.means, found.estimate.variances
            return ours[:, :units], Against(*moments, found.wanted, np.full_like(pairs, np.nan))
        variances = theirs.var(axis=1, ddof=1) / OTHER
        against = Against(theirs.mean(axis=1), variances, np.full(len(theirs), OTHER), pairs)
        return ours[:, :units], against

    return pair


def find_equal_difference(
    means: np.ndarray, variances: np.ndarray, half_width: float, *, same_noise: bool
) -> float:
    """Pictures of each synset that an equal design needs for a difference; see `make_pair`."""
    squares = variances + means**2
    kept = ALIKE + (1 - ALIKE) * (1 - LOSS)
    theirs = (ALIKE + (1 - ALIKE) * (1 - LOSS) ** 2) * squares - (kept * means) ** 2
    shared = ALIKE * variances if same_noise else np.zeros_like(variances)
    aim = len(means) * (half_width / Z) ** 2

    units = np.arange(10, 10_000) / 10
    found = variances.mean() / units + theirs.mean() / OTHER - 2 * shared.mean() / np.maximum(units, OTHER)
    return float(units[np.argmax(found <= aim)])


def replay(truth: Draw | Pair, mean: float, half_width: float, runs: int, limit: int) -> dict[str, Any]:
    """Follow the rule in many runs: units, coverage, bias."""
    rows = []
    for number in range(runs):
        drawn = truth(np.random.default_rng([number, 1]), limit)
        values, against = drawn if isinstance(drawn, tuple) else (drawn, None)
        course = follow_mean(values, np.full(len(values), limit), limit, half_width, against)
        assert course.estimate is not None
        used = np.arange(limit) < course.wanted[:, None]
        plain = float((np.where(used, values, 0).sum(axis=1) / course.wanted).mean())
        plain -= 0.0 if against is None else float(against.means.mean())
        error, width = course.estimate.value - mean, course.estimate.half_width
        rows.append(
            (course.wanted.sum(), error, width, plain - mean, len(course.looks), course.reason == "reached")
        )
    units, errors, widths, plain, looks, reached = np.array(rows, float).T
    covered = float((np.abs(errors) <= widths).mean())
    return {
        "runs": runs,
        "units": float(units.mean()),
        "reached": float(reached.mean()),
        "looks": float(looks.mean()),
        "half_width": float(widths.mean()),
        "true_half_width": float(Z * errors.std(ddof=1)),
        "coverage": covered,
        "coverage_stderr": float(np.sqrt(covered * (1 - covered) / runs)),
        "bias": float(errors.mean()),
        "plain_coverage": float((np.abs(plain) <= widths).mean()),
        "plain_bias": float(plain.mean()),
    }


def bench_means(run: Path | None, runs: int, only: str) -> list[dict[str, Any]]:
    """One row a truth and half-width."""
    rows = []
    for name, (draw, means, variances, half_widths) in make_truths(run).items():
        for half_width in half_widths:
            if only and only not in name:
                continue
            equal = Z**2 * variances.mean() / (len(means) * half_width**2)
            rows.append(bench_row(name, draw, float(means.mean()), len(means), half_width, equal, runs))
    return rows


def bench_row(
    name: str, draw: Draw | Pair, mean: float, synsets: int, half_width: float, equal: float, runs: int
) -> dict[str, Any]:
    """Replay one truth and half-width; `equal` is what equal numbers need."""
    began = time.perf_counter()
    equal = max(equal, 2.0)  # one picture has no spread to tell an interval from
    limit = 64 if np.isnan(equal) else int(max(8, 4 * np.ceil(equal)))
    found = replay(draw, mean, half_width, runs, limit)
    found |= {
        "truth": name,
        "synsets": synsets,
        "asked": half_width,
        "equal": float(equal),
        "a_synset": found["units"] / synsets,
        "share": found["units"] / synsets / equal,
        "seconds": time.perf_counter() - began,
    }
    print(format_row(found), flush=True)
    return found


UNTIL = 0.0015  # of a run to compare with that drew until it knew its own mean
UNTIL_BOTH = 0.0022
DIFFERENCES = {"embedded": {False: 0.002, True: 0.0012}, "beta, most": {False: 0.003, True: 0.002}}


def bench_differences(run: Path | None, runs: int, only: str) -> list[dict[str, Any]]:
    """One row a truth, with other and with the same noise."""
    rows = []
    for name, (draw, means, variances, _) in make_truths(run).items():
        asked = next((each for start, each in DIFFERENCES.items() if name.startswith(start)), {})
        mean = float(means.mean()) * (1 - ALIKE) * LOSS
        for same_noise, half_width in asked.items():
            title = f"difference, {'same' if same_noise else 'other'} noise: {name}"
            if only and only not in title:
                continue
            equal = find_equal_difference(means, variances, half_width, same_noise=same_noise)
            pair = make_pair(draw, same_noise=same_noise)
            rows.append(bench_row(title, pair, mean, len(means), half_width, equal, runs))
        title = f"difference, same noise, from a run until ± {UNTIL:g}: {name}"
        if asked and name.startswith("embedded") and (not only or only in title):
            pair = make_pair(draw, same_noise=True, until=UNTIL)
            rows.append(bench_row(title, pair, mean, len(means), UNTIL_BOTH, np.nan, runs))
    return rows


HEAD = (
    "| truth | half-width asked | pictures a synset, equal design | adaptive | share | coverage of 95 % "
    "| bias / half-width | plain mean: coverage | bias / half-width |\n|---|---|---|---|---|---|---|---|---|"
)


def format_row(row: dict[str, Any]) -> str:
    """One row of the table."""
    return (
        f"| {row['truth']} | ± {row['asked']:g} | {row['equal']:.1f} | {row['a_synset']:.1f} "
        f"| {row['share']:.2f} | {row['coverage']:.3f} | {row['bias'] / row['asked']:+.3f} "
        f"| {row['plain_coverage']:.3f} | {row['plain_bias'] / row['asked']:+.2f} |"
    )


def bench_unknown(runs: int, limit: int = 64) -> dict[str, Any]:
    """The two lists' false discoveries, and the pictures that the verdicts took."""
    rng = np.random.default_rng(1)
    chances = rng.uniform(0.002, 0.02, SYNSETS)
    limits = find_limits(chances, 0.2)
    # A third lies exactly at its chance, a third exactly at the limit, a third far above: the hardest truths.
    kinds = rng.integers(0, 3, SYNSETS)
    means = np.select([kinds == 0, kinds == 1], [chances, limits], rng.uniform(0.3, 0.9, SYNSETS))
    rows = []
    for number in range(runs):
        stream = np.random.default_rng([number, 2])
        values = (stream.random((SYNSETS, limit)) < means[:, None]).astype(float)
        course, bets = follow_unknown(values, np.full(SYNSETS, limit), limit, chances, 0.2)
        assert bets is not None
        known, unknown = bets.verdicts == "known", bets.q_unknown <= 0.05
        rows.append((
            (known & (means <= chances)).sum() / max(known.sum(), 1),
            (unknown & (means >= limits)).sum() / max(unknown.sum(), 1),
            (bets.verdicts != "undecided").mean(),
            course.wanted.mean(),
        ))  # fmt: skip
    false_known, false_unknown, decided, units = np.array(rows).mean(axis=0)
    return {
        "runs": runs,
        "false_known": float(false_known),
        "false_unknown": float(false_unknown),
        "decided": float(decided),
        "a_synset": float(units),
        "equal": limit,
    }


def main() -> None:
    """Simulate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--only", default="", help="truths whose name holds this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(HEAD, flush=True)
    found: dict[str, Any] = {"means": bench_means(options.run, options.runs, options.only)}
    found["differences"] = bench_differences(options.run, options.runs, options.only)
    if not options.only or options.only == "unknown":
        found["unknown"] = row = bench_unknown(max(options.runs // 10, 1))
        print(
            f"\nunknown, {row['runs']} runs: {row['false_known']:.3f} of the known list and "
            f"{row['false_unknown']:.3f} of the unknown list are false, {row['decided']:.2f} decided, "
            f"{row['a_synset']:.1f} pictures a synset of {row['equal']}"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

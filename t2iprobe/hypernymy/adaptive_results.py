"""What a run that ends by a rule may say: the rule's own number, and everything else of equal numbers."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from t2iprobe.errors import UserError
from t2iprobe.hypernymy import allocation, betting, resampling
from t2iprobe.hypernymy.adaptive import CHANCE_QUANTILE, Followed, follow, has_rule, read_values
from t2iprobe.hypernymy.allocation import FIRST, Halves
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.samples import estimate, to_number
from t2iprobe.hypernymy.statistics import analyse
from t2iprobe.hypernymy.until import Until
from t2iprobe.intervals import LEVEL
from t2iprobe.runs import Run

SEED = 0  # of the resampling
RESAMPLES = 1000


def analyse_run(run: Run, hierarchy: Hierarchy) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return classifier → results as `statistics.analyse` gives them, and what the results say of the rule.

    The mean in-subtree probability is that of the rule. All else is of the equal numbers at the beginning,
    since SCS depends on the number of pictures, and numbers chosen by what was seen would bend it.
    """
    followed = follow(run)
    course = followed.course
    analyses = {}
    for name in run.classifiers:
        rows = run.logit_rows(name)
        if not course.looks:  # nothing can be said under the rule yet
            analyses[name] = analyse(run.logits(name), hierarchy)
            continue
        logits = {
            synset: np.stack([rows[p] for unit in units[: course.equal] for p in unit])
            for synset, units in sorted(followed.positions.items())
        }
        analyses[name] = analysis = analyse(logits, hierarchy)
        if course.halves is not None:
            limit = course.halves.values.shape[1]
            values = read_values(rows, followed.positions, followed.names, hierarchy, limit)
            _put_means(analysis, followed, Halves(values, course.halves.owner))
        elif name == run.classifiers[0]:
            _put_verdicts(analysis, followed)
        analysis["warnings"] = [describe_numbers(followed), *analysis["warnings"]]
    return analyses, describe(followed)


def describe_numbers(followed: Followed) -> str:
    """Return what the numbers of an adaptive run are of."""
    counts = followed.count_pictures().values()
    equal = sum(map(len, followed.positions[followed.names[0]][: followed.course.equal]))
    if followed.until.question == "unknown":
        what = "known and unknown words are the verdicts of the rule"
    else:
        what = "ISP is the mean that the rule allows"
    return (
        f"the run drew until {followed.until}, from {min(counts)} to {max(counts)} pictures a synset: "
        f"{what}; "
        f"everything else is of the first {equal} pictures of each, so that it compares with a run of "
        f"{equal} pictures"
    )


def describe(followed: Followed) -> dict[str, Any]:
    """Return what results.json says of the rule, its looks, its interval and why it ended."""
    course, until = followed.course, followed.until
    pictures = followed.count_pictures()
    each = {len(unit) for name in followed.names for unit in followed.positions[name]}
    found: dict[str, Any] = {
        "rule": str(until),
        **until.identify(),
        "stopped": course.reason,
        "pictures": sum(pictures.values()),
        "pictures_min": min(pictures.values()),
        "pictures_max": max(pictures.values()),
        "limit": max(map(len, followed.positions.values())) * max(each),
        "equal": course.equal,
        "looks": [
            {
                "units": look.units,
                "fewest": look.fewest,
                "most": look.most,
                "value": look.value,
                "half_width": to_number(look.half_width),
            }
            for look in course.looks
        ],
        "synsets": pictures,
    }
    if course.estimate is not None:
        value, half_width = course.estimate.value, course.estimate.half_width
        assert course.spread is not None
        found |= {
            "value": value,
            "interval": [value - half_width, value + half_width],
            "reached_half_width": half_width,
            "level": LEVEL,
            "equal_design": _count_equal_design(followed) * max(each),
            "method": (
                "stratified mean of two halves of each synset's pictures; how many a half gets is decided by "
                "the first pictures of the other half; the run ends at the first look whose interval is "
                "narrow enough (fixed width, Student's t with Satterthwaite's degrees of freedom), a rule "
                "that sees the spread and not the mean"
            ),
        }
    if followed.bets is not None:
        verdicts = followed.bets.verdicts.tolist()
        found |= {
            "decided": float(np.mean([verdict != "undecided" for verdict in verdicts])),
            "verdicts": dict(zip(followed.names, verdicts, strict=True)),
            "alpha": betting.ALPHA,
            "method": describe_bets(until),
        }
    return found


def describe_bets(until: Until) -> str:
    """Return what the verdicts mean."""
    return (
        "bets on each synset's pictures, valid whenever they are settled: known is a mean in-subtree "
        f"probability above chance (what {CHANCE_QUANTILE:.0%} of unrelated prompts give to the subtree in "
        "their first pictures, or the uniform floor), unknown one below a limit that lies a share of "
        f"{until.tolerance:g} of the way from chance to 1; the false-discovery rate of either list is "
        f"controlled (Benjamini-Hochberg on 1 / wealth) at {betting.ALPHA}"
    )


def describe_lines(until: Mapping[str, Any]) -> list[str]:
    """Return what a person reads of the rule at the end of a run, from `describe`'s words."""
    ends = {
        "reached": "reached",
        "limit": f"not reached with {until['limit']} pictures a synset, the limit: --extend it by --samples",
        None: "not reached yet",
    }
    spread = f"{until['pictures']:,} pictures, {until['pictures_min']} to {until['pictures_max']} a synset"
    lines = [f"until {until['rule']}: {ends[until['stopped']]}; {spread}"]
    if until.get("interval"):
        low, high = until["interval"]
        name = "difference of ISP" if until["question"] == "difference" else "ISP"
        lines.append(f"{name} {until['value']:.4f}  [{low:.4f}, {high:.4f}] under this rule")
        lines.append(f"equal numbers would have taken about {until['equal_design']:,} pictures for it")
    if "verdicts" in until:
        verdicts = list(until["verdicts"].values())
        counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("known", "unknown", "undecided"))
        lines.append(counts)
    return lines


def _count_equal_design(followed: Followed) -> int:
    """Units that the same half-width would have taken with the same number for every synset."""
    course, against = followed.course, followed.against
    assert course.estimate is not None
    assert course.spread is not None
    count = len(followed.names)
    fixed = 0.0 if against is None else float((course.estimate.variances - course.estimate.own).sum())
    aim = (course.estimate.stderr * count) ** 2 - fixed
    each = float(course.spread.sum()) / aim if aim > 0 else FIRST
    return count * max(FIRST, int(np.ceil(each - 1e-9)))


def _put_means(analysis: dict[str, Any], followed: Followed, halves: Halves) -> None:
    """Put the rule's mean into the results, and each synset's into its row."""
    found = allocation.estimate_mean(halves)
    rng = np.random.default_rng(SEED)
    rows = resampling.bootstrap_rows(len(found.means), RESAMPLES, rng)
    over_synsets = estimate(found.means, np.full((2, len(found.means)), np.nan), rows)
    analysis["results"]["isp"] = over_synsets | {
        "value": found.value,
        "stderr": found.stderr,
        "interval": [found.value - found.half_width, found.value + found.half_width],
    }
    means = dict(zip(followed.names, range(len(found.means)), strict=True))
    for row in analysis["synsets"]:
        s = means.get(row["synset"])
        if s is None or row["floor"] == 1:  # a synset above every class, of which nothing is uncertain
            continue
        used = halves.values[s, halves.owner[s] >= 0]
        low, high = resampling.bootstrap_probability(used, RESAMPLES, rng)
        mean = float(found.means[s])
        row["isp"], row["isp_stderr"] = mean, float(np.sqrt(found.variances[s]))
        row["isp_interval"] = [min(low, mean), max(high, mean)]


def _put_verdicts(analysis: dict[str, Any], followed: Followed) -> None:
    """Put the verdicts of the bets in place of the usual test's."""
    bets, chances = followed.bets, followed.chances
    assert bets is not None
    assert chances is not None
    place = {name: s for s, name in enumerate(followed.names)}
    for row in analysis["synsets"]:
        s = place[row["synset"]]
        row["known"] = bool(bets.verdicts[s] == "known")
        if chances[s] < 1:
            row |= {"p": float(bets.p_known[s]), "q": float(bets.q_known[s]), "chance": float(chances[s])}
            row["test"] = "bets"
    analysis["unknown_test"] |= {
        "rank": 0,
        "t": 0,
        "bets": int((chances < 1).sum()),
        "text": describe_bets(followed.until),
    }


# synset → (template, index) → logits [C]
Rows = dict[str, dict[tuple[str, int], np.ndarray]]


def comparable_rows(run: Run, classifier: str) -> tuple[Rows, list[str]]:
    """Return the logits to compare with another run's, and a warning where some were left out or lack.

    Numbers of pictures that were chosen by what was seen bend plain means; so only the equal numbers at the
    beginning of an adaptive run are compared.
    """
    rows, warnings = run.logit_rows(classifier), []
    positions: Iterable[int] = rows
    if has_rule(run):
        followed = follow(run)
        if not followed.course.looks:
            raise UserError(f"{run.path} has not come to its first look yet: continue it")
        equal = followed.course.equal
        positions = [p for units in followed.positions.values() for unit in units[:equal] for p in unit]
        warnings.append(
            f"{run.path.name} drew until {followed.until}: only the first {equal} pictures of each synset "
            f'are compared; for a difference with an interval of its own, use --until "isp - RUN ± …"'
        )
    elif not run.complete:
        warnings.append(f"{run.path.name} is not complete: {len(run.missing())} of its pictures lack")
    found: Rows = {}
    for position in positions:
        entry = run.plan[position]
        found.setdefault(entry.synset, {})[entry.template, entry.index] = rows[position]
    return dict(sorted(found.items())), warnings

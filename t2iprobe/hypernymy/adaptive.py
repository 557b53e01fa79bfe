"""A run that ends when its question is answered: which pictures does it lack?

Nothing is remembered but the pictures. What to draw next is read off the stored logits at fixed looks, so
that a run that was killed decides what it would have decided. The pictures of a synset are always the first
ones of its plan; `samples` is the most it may get. `adaptive_results` says what such a run may then say.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe.config import Study
from t2iprobe.errors import UserError
from t2iprobe.hypernymy import allocation, betting
from t2iprobe.hypernymy.allocation import FIRST, Against, Counts, Course, Halves
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.metrics import Floats, in_subtree_probabilities, softmax
from t2iprobe.hypernymy.statistics import UNRELATED_PROMPTS
from t2iprobe.hypernymy.until import Until, read_until
from t2iprobe.runs import WHOLE, PlanEntry, Run, Share

CHANCE_QUANTILE = 0.95  # of unrelated prompts


def check_study(study: Study, folder: Path | None = None) -> Until | None:
    """Return the rule of a study, None where it has none. Raises UserError where it cannot be followed."""
    if study.until is None:
        return None
    until = read_until(study.until)
    if folder is not None:
        raise UserError("--until draws pictures; those made elsewhere are all judged: leave it out")
    if study.samples < FIRST:
        raise UserError(
            f"--until needs pictures to tell a spread from: --samples, the most a synset may get, must be at "
            f"least {FIRST}"
        )
    if used := [key for key in ("common_seeds", "mean_conditioning", "languages") if getattr(study, key)]:
        raise UserError(
            f"--until asks for one number, {used[0]} for a comparison within the run: use one of the two"
        )
    return until


def hash_against(study: Study) -> dict[str, str]:
    """Return where the run lies that a study's rule compares with, and the hash of its logits; {} if none."""
    until = read_until(study.until) if study.until else None
    if until is None or until.run is None:
        return {}
    run = Run.open(until.run)
    if not is_complete(run):
        raise UserError(f"{until.run}, the run to compare with, is not complete: finish it first")
    digest = hashlib.sha256()
    for position, row in run.logit_rows(_shared_classifier(run, study.classifiers[0])).items():
        digest.update(position.to_bytes(8, "little") + row.tobytes())
    return {"path": str(until.run.resolve()), "hash": f"sha256:{digest.hexdigest()}"}


def has_rule(run: Run) -> bool:
    """Whether a run ends by a rule, and not with its plan."""
    return bool(run.manifest["identity"].get("until"))


def find_missing(run: Run, share: Share = WHOLE) -> list[int]:
    """Return the plan positions of `share` to draw now: all that are missing, or what the next look needs."""
    if not has_rule(run):
        return run.missing(share)
    return [p for p in follow(run).missing if p % share[1] == share[0]]


def list_rounds(
    run: Run, share: Share = WHOLE, wait: Callable[[], None] | None = None
) -> Iterator[list[int]]:
    """Yield the plan positions that `share` is to draw, none empty; what was yielded is then to be stored.

    With a rule that is once a look, else once. `wait` returns when all processes that share the run have come
    there: then all decide from the same pictures.
    """
    if not has_rule(run):
        if missing := run.missing(share):
            yield missing
        return
    wait = wait or (lambda: None)
    while True:
        wait()  # all pictures of the last look are stored
        missing = find_missing(run)
        wait()  # all have read, before any writes
        if not missing:
            return
        if mine := [p for p in missing if p % share[1] == share[0]]:
            yield mine


def is_complete(run: Run) -> bool:
    """Whether nothing is left to draw: every picture is stored, or the question is answered."""
    return not find_missing(run)


def refuse_shares(run: Run) -> None:
    """Raise UserError where a run with a rule is to be drawn by processes that do not wait for each other."""
    if has_rule(run):
        raise UserError(
            "--until decides what to draw next from all that was drawn, and shares do not wait for each "
            "other: leave --shard out; `accelerate launch` and --cluster divide such a run, too"
        )


def describe_plan(manifest: Mapping[str, Any], plan: Sequence[PlanEntry]) -> dict[str, Any]:
    """Return what is known of a run with a rule before it: how many pictures at least, and at most."""
    until = manifest["identity"]["until"]
    first = betting.PILOT if until["question"] == "unknown" else FIRST
    return {
        "rule": str(read_until(manifest["configuration"]["until"])),
        "pictures_first": sum(entry.index < first for entry in plan),
        "pictures_most": len(plan),
    }


def describe_rule(plan: Mapping[str, Any]) -> str:
    """Return `describe_plan` for a person."""
    return (
        f"until {plan['rule']}: it may end at its first look, after {plan['pictures_first']:,} pictures, and "
        f"draws {plan['pictures_most']:,} at most, which the time is for"
    )


@dataclass
class Followed:
    """A run with a rule, followed through what is stored.

    Attributes:
        until: the rule.
        names: [S] the synsets that it is about.
        positions: synset → unit → plan positions; a unit is one picture for each template.
        missing: plan positions that the next look needs.
        course: how far the rule has come.
        bets: of ``unknown``.
        chances: of ``unknown``: [S] what a mean must be above for a word to be known.
        against: of a difference.
    """

    until: Until
    names: list[str]
    positions: dict[str, list[list[int]]]
    missing: list[int]
    course: Course
    bets: betting.Bets | None = None
    chances: Floats | None = None
    against: Against | None = None

    def count_pictures(self) -> dict[str, int]:
        """Return synset → how many pictures the last look had."""
        units = self.course.wanted.tolist() if self.course.reason else self._units_of_last_look()
        return {
            name: sum(map(len, self.positions[name][:count]))
            for name, count in zip(self.names, units, strict=True)
        }

    def _units_of_last_look(self) -> list[int]:
        halves = self.course.halves
        return [0] * len(self.names) if halves is None else halves.counts.sum(axis=0).tolist()


def follow(run: Run) -> Followed:
    """Follow a run's rule through its stored logits."""
    hierarchy = _load_hierarchy(run)
    until = _read_rule(run)
    positions = _group_positions(run)
    names = _choose_synsets(positions, hierarchy, until)
    rows = run.logit_rows(run.classifiers[0])
    limit = max(len(units) for units in positions.values())
    values = read_values(rows, positions, names, hierarchy, limit)
    stored = _count_leading(values)
    bets = chances = against = None
    if until.question == "unknown":
        assert until.tolerance is not None
        chances = _find_chances(rows, positions, names, hierarchy, stored)
        course, bets = betting.follow_unknown(values, stored, limit, chances, until.tolerance)
    else:
        assert until.half_width is not None
        against = _read_against(run, until, names, limit) if until.question == "difference" else None
        course = allocation.follow_mean(values, stored, limit, until.half_width, against)
    wanted = dict.fromkeys(positions, int(course.wanted.min()))  # of leaves beside the synsets asked for
    wanted |= dict(zip(names, course.wanted.tolist(), strict=True))
    needed = {p for name, units in positions.items() for unit in units[: wanted[name]] for p in unit}
    return Followed(until, names, positions, sorted(needed - rows.keys()), course, bets, chances, against)


def _read_rule(run: Run) -> Until:
    """The rule that the manifest states."""
    found = run.manifest["identity"]["until"]
    text = run.manifest["configuration"].get("until")
    path = read_until(text).run if text else None
    return Until(found["question"], found.get("half_width"), path, found.get("tolerance"))


def _load_hierarchy(run: Run) -> Hierarchy:
    path = run.manifest["configuration"].get("hierarchy")
    return Hierarchy.from_csv(Path(path)) if path else Hierarchy.imagenet()


def _group_positions(run: Run) -> dict[str, list[list[int]]]:
    """Synset → unit → plan positions, units by index."""
    found: dict[str, dict[int, list[int]]] = {}
    for position, entry in enumerate(run.plan):
        found.setdefault(entry.synset, {}).setdefault(entry.index, []).append(position)
    return {name: [units[index] for index in sorted(units)] for name, units in found.items()}


def _choose_synsets(positions: Mapping[str, Any], hierarchy: Hierarchy, until: Until) -> list[str]:
    """The synsets that a question is about: those of the headline, or all."""
    names = sorted(positions)
    if until.question == "unknown":
        return names
    return [name for name in names if name in set(hierarchy.synsets)] or names


def read_values(
    rows: Mapping[int, np.ndarray],
    positions: Mapping[str, Sequence[Sequence[int]]],
    names: Sequence[str],
    hierarchy: Hierarchy,
    limit: int,
) -> Floats:
    """[S, limit] mean in-subtree probability of each unit, NaN where a picture of it is not stored."""
    values = np.full((len(names), limit), np.nan)
    for row, name, subtree in zip(values, names, hierarchy.subtrees_of(list(names)), strict=True):
        whole = [
            (place, unit)
            for place, unit in enumerate(positions[name])
            if all(position in rows for position in unit)
        ]
        if not whole:
            continue
        logits = np.stack([rows[position] for _, unit in whole for position in unit])
        probabilities = in_subtree_probabilities(logits, subtree)
        starts = np.cumsum([0, *(len(unit) for _, unit in whole[:-1])])
        sums = np.add.reduceat(probabilities, starts)
        row[[place for place, _ in whole]] = sums / [len(unit) for _, unit in whole]
    return values


def _count_leading(values: Floats) -> Counts:
    """[S] units stored without a gap."""
    lacking = np.isnan(values)
    return np.where(lacking.any(axis=1), lacking.argmax(axis=1), values.shape[1])


def _find_chances(
    rows: Mapping[int, np.ndarray],
    positions: Mapping[str, Sequence[Sequence[int]]],
    names: Sequence[str],
    hierarchy: Hierarchy,
    stored: Counts,
) -> Floats | None:
    """[S] what a known word's mean must be above, from the pilots of unrelated synsets; 1 where all counts.

    None as long as a pilot is not stored.
    """
    pilot = min(betting.PILOT, min(len(positions[name]) for name in names))
    if (stored < pilot).any():
        return None
    subtrees = hierarchy.subtrees_of(list(names)).astype(np.float64)
    prompts = np.stack(
        [
            softmax(np.stack([rows[p] for unit in positions[name][:pilot] for p in unit])).mean(axis=0)
            for name in names
        ]
    )
    given, unrelated = prompts @ subtrees.T, subtrees @ subtrees.T == 0
    chances = subtrees.mean(axis=1)
    for s in range(len(names)):
        others = given[unrelated[:, s], s]
        if len(others) >= UNRELATED_PROMPTS:
            chances[s] = max(chances[s], float(np.quantile(others, CHANCE_QUANTILE)))
    return np.where(subtrees.all(axis=1), 1.0, chances)


def _shared_classifier(run: Run, name: str) -> str:
    if name not in run.classifiers:
        raise UserError(
            f"{run.path}, the run to compare with, was not judged by {name}, but by "
            f"{', '.join(run.classifiers)}"
        )
    return name


def _read_against(run: Run, until: Until, names: Sequence[str], limit: int) -> Against:
    """The run that ours is compared with, synset by synset. Raises UserError where it does not compare."""
    found = run.manifest["inputs"]["against"]
    path = next((p for p in (until.run, Path(found["path"])) if p and (p / "manifest.json").exists()), None)
    if path is None:
        raise UserError(f"the run to compare with is not at {found['path']} any more")
    other = Run.open(path)
    if other.manifest["identity"]["hierarchy"] != run.manifest["identity"]["hierarchy"]:
        raise UserError(f"{path} was judged on other classes: it does not compare")
    classifier = _shared_classifier(other, run.classifiers[0])
    hierarchy, rows = _load_hierarchy(other), other.logit_rows(classifier)
    ours, theirs = _group_positions(run), _group_positions(other)
    if lacking := [name for name in names if name not in theirs]:
        raise UserError(
            f"{path} has no pictures of {len(lacking)} of the synsets ({', '.join(lacking[:3])}): give "
            "--synsets that both have"
        )
    length = max(len(theirs[name]) for name in names)
    values = read_values(rows, theirs, names, hierarchy, length)
    if has_rule(other):
        halves = follow(other).course.halves
        if halves is None or len(halves.owner) != len(names):
            raise UserError(f"{path} drew until something else: its means do not compare")
        part = allocation.estimate_mean(Halves(values, halves.owner))
        # Numbers that both follow what the same noise shows: intervals that count pairs hold in 91 % only.
        pairs = np.full_like(values, np.nan)
        against = Against(part.means, part.variances, halves.counts.sum(axis=0), pairs)
    else:
        counts = _count_leading(values)
        if (counts < FIRST).any():
            raise UserError(f"{path} has one picture of some synsets: there is no spread to compare with")
        pairs = _keep_pairs(values, [_name_units(run, ours, names), _name_units(other, theirs, names)])
        variances = np.nanvar(values, axis=1, ddof=1) / counts
        against = Against(np.nanmean(values, axis=1), variances, counts, pairs)
    least = 1.96 * float(np.sqrt(against.variances.sum())) / len(names)
    if np.isnan(pairs).all() and until.half_width is not None and least >= until.half_width:
        raise UserError(
            f"the pictures of {path} alone leave ± {least:.2g}: no number of ours reaches "
            f"± {until.half_width:g}; draw more of that run"
        )
    return against


def _name_units(
    run: Run, positions: Mapping[str, Sequence[Sequence[int]]], names: Sequence[str]
) -> list[list[list[tuple[str, int]]]]:
    """Synset → unit → the prompts and seeds of its pictures: what makes them."""
    return [
        [[(run.plan[p].prompt, run.plan[p].seed) for p in unit] for unit in positions[name]] for name in names
    ]


def _keep_pairs(values: Floats, made: Sequence[Sequence[Sequence[Any]]]) -> Floats:
    """Values [S, M], NaN where our unit was not made as theirs was."""
    pairs = np.full_like(values, np.nan)
    for s, (ours, theirs) in enumerate(zip(*made, strict=True)):
        for place, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
            if mine == other:
                pairs[s, place] = values[s, place]
    return pairs

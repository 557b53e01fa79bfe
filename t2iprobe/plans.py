"""What a run draws: its plan, derived from the manifest; and whether a wanted run is the stored one."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2iprobe.errors import UserError

Manifest = dict[str, Any]


@dataclass(frozen=True)
class PlanEntry:
    """One picture to draw, named by what makes it."""

    synset: str
    template: str
    index: int
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        """The picture's file name without its ending."""
        slug = self.template
        if not re.fullmatch(r"\w{1,40}", slug):
            digest = hashlib.sha256(self.template.encode()).hexdigest()[:8]
            slug = f"{re.sub(r'[^A-Za-z0-9]+', '_', self.template)[:32].strip('_')}-{digest}"
        return f"{slug}-{self.index:04d}"


def picture_seed(run_seed: int, synset: str, template: str, index: int) -> int:
    """Hash what makes a picture into its generator's seed, 0 ≤ seed < 2**63."""
    key = json.dumps([run_seed, synset, template, index])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def build_plan(segments: Sequence[Mapping[str, Any]], run_seed: int) -> list[PlanEntry]:
    """List the pictures of a run, index outermost, so that a part of the run already covers all synsets.

    A segment is ``{"samples": N, "prompts": {synset: {template: prompt}}}``. An extended run has several: a
    later one adds what the earlier ones lack, behind them, so that positions never change. With
    ``"common_seeds": True`` a picture's seed does not depend on its template.
    """
    plan: dict[tuple[str, str, int], PlanEntry] = {}
    for segment in segments:
        prompts = {synset: list(by_template.items()) for synset, by_template in segment["prompts"].items()}
        for index in range(segment["samples"]):
            for column in range(max(map(len, prompts.values()), default=0)):
                for synset, templates in prompts.items():
                    if column < len(templates):
                        template, prompt = templates[column]
                        named = "" if segment.get("common_seeds") else template
                        seed = picture_seed(run_seed, synset, named, index)
                        plan.setdefault(
                            (synset, template, index), PlanEntry(synset, template, index, prompt, seed)
                        )
    return list(plan.values())


def reconcile(stored: Manifest, wanted: Manifest, where: Path, *, extend: bool) -> Manifest:
    """Return the manifest to go on with in the run directory `where`: the stored one, or that one extended.

    Raises UserError with the differences where `wanted` is another run.
    """
    differences = _differences(stored["identity"], wanted["identity"])
    if differences:
        raise UserError(
            f"{where} holds a run with another configuration: {'; '.join(differences)}. "
            "Give another --out, or the settings of that run"
        )
    rule, other = ({"until": manifest["identity"].get("until")} for manifest in (stored, wanted))
    if rule != other and not extend:
        change = "; ".join(_differences(rule, other, skipped=()))
        raise UserError(f"{where} holds a run with another end: {change}. Add --extend to go on to it")
    old, new = (
        {
            (entry.synset, entry.template, entry.index): entry.prompt
            for entry in build_plan(manifest["plan"], 0)
        }
        for manifest in (stored, wanted)
    )
    if old == new:
        kept = {"plan": stored["plan"], "created": stored["created"]}
        return stored if rule == other else {**wanted, **kept}
    grown = old.items() <= new.items()
    if grown and extend:
        return {**wanted, "plan": [*stored["plan"], *wanted["plan"]], "created": stored["created"]}
    change = _plan_change(stored["identity"], wanted["identity"], old, new)
    advice = "add --extend to draw what is new" if grown else "give another --out, or the plan of that run"
    raise UserError(f"{where} holds a run with another plan: {change}; {advice}")


# Compared as the plan, which --extend may enlarge, and as the rule, which it may change.
GROWING = ("samples", "synsets", "until")


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], skipped: Sequence[str] = GROWING
) -> list[str]:
    """Return "key: old → new" for the leaves of two identities that differ."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    keys = [key for key in flat_old | flat_new if key.split(".")[0] not in skipped]
    return [
        f"{key}: {_show(flat_old.get(key))} → {_show(flat_new.get(key))}"
        for key in keys
        if flat_old.get(key) != flat_new.get(key)
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"


def _plan_change(
    old_identity: Mapping[str, Any], new_identity: Mapping[str, Any], old: Mapping, new: Mapping
) -> str:
    changes = [f"{len(old)} → {len(new)} pictures"]
    if old_identity["samples"] != new_identity["samples"]:
        changes.append(f"samples {old_identity['samples']} → {new_identity['samples']}")
    before, after = set(old_identity["synsets"]), set(new_identity["synsets"])
    if before != after:
        changes.append(f"synsets {len(before)} → {len(after)}")
        changes += [f"+{name}" for name in sorted(after - before)[:3]]
        changes += [f"−{name}" for name in sorted(before - after)[:3]]
    if changed := [key[0] for key in old if key in new and old[key] != new[key]]:
        changes.append(f"other prompts, such as that of {changed[0]}")
    return ", ".join(changes)

"""How well each stopping rule stops, on made-up loss curves of many shapes and jitters.

    python benchmarks/stopping.py [--seeds 200] [--first-seed 1000] [--json] [--out FILE]

A curve is `level · (1 − size · (fall(t) + jitter(t)))` at the steps t = 0..6100; fall goes from 0 to about 1
and the size of the fall is drawn from 0.6 % to 40 % of the loss. The jitter is given in units of the fall.
The plateau rule's settings were chosen on `SHAPES` with other seeds, and not on `HELD_OUT`.

What is to be reached is the greatest fall of the curve without jitter. A stop is

- early  where less than 95 % of it had been reached by then;
- late   after twice the steps at which 99 % was reached (or twice 310 steps, the least window published for
         textual inversion, where that is more), or after the curve has risen back above 95 % of the fall;
- never  at the cap, where that is late;
- right  else. So the cap is right where a curve still falls in the second half of the budget.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from t2iprobe.inversion.stopping import (
    DVAR,
    MAX_STEPS,
    PRESETS,
    Budget,
    ClipScore,
    Plateau,
    Stopper,
    judge_plateau,
)

CAP = MAX_STEPS["textual-inversion"]
STEPS = np.arange(CAP + 1.0)
LEAST_STEPS = 310
OUTCOMES = ("right", "early", "late", "never")
# Patience on the loss itself, as the trainers have it: no new best in 350 steps.
PATIENCE = {"eps": 0.0, "patience": 6}
NEAR = 0.05  # rules whose shares of right stops differ by less than this are called equal


def decay(scale: float, start: float = 0) -> np.ndarray:
    return 1 - np.exp(-np.clip(STEPS - start, 0, None) / scale)


def power(scale: float, exponent: float) -> np.ndarray:
    fall = 1 - (1 + STEPS / scale) ** -exponent
    return fall / fall[-1]


SHAPES = {
    "decay 30": decay(30),
    "decay 100": decay(100),
    "decay 300": decay(300),
    "decay 1000": decay(1000),
    "power law t^-½": power(50, 0.5),
    "two phases, second at 400": 0.5 * decay(60) + 0.5 * decay(100, 400),
    "straight to the cap": STEPS / CAP,
    "nothing": 0 * STEPS,
    "falls and rises": decay(100) - np.clip((STEPS - 600) / 2000, 0, None),
    "drops at 300 and 700": 0.6 * (STEPS >= 300) + 0.4 * (STEPS >= 700),
    "drop at 200": 1.0 * (STEPS >= 200),
}
HELD_OUT = {
    "stretched decay": 1 - np.exp(-((STEPS / 150) ** 0.6)),
    "slow start, at 500": 1 / (1 + np.exp(-(STEPS - 500) / 80)),
    "decays 40 and 600": 0.7 * decay(40) + 0.3 * decay(600),
    "straight to 800": np.clip(STEPS / 800, 0, 1),
    "four drops to 600": 0.25 * np.searchsorted([150, 300, 450, 600], STEPS, side="right"),
    "falls to 1500 and rises": np.sin(np.pi / 2 * np.clip(STEPS / 1500, 0, 2.6)),
    "decay 200 and a wave": decay(200) + 0.04 * np.sin(STEPS * np.pi / 150) * np.exp(-STEPS / 1500),
    "power law t^-1": power(100, 1.0),
    "only rises": -0.3 * STEPS / CAP,
    "second phase at 1500": 0.7 * decay(80) + 0.3 * decay(200, 1500),
}
JITTERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "white 3 %": lambda noise, fall: 0.03 * noise,
    "white 10 %": lambda noise, fall: 0.1 * noise,
    "white 30 %": lambda noise, fall: 0.3 * noise,
    "memory 20": lambda noise, fall: 0.1 * remember(noise, 0.95),
    "memory 100": lambda noise, fall: 0.1 * remember(noise, 0.99),
    "wanes": lambda noise, fall: (0.02 + 0.15 * np.abs(1 - fall))[:, None] * noise,
}


def remember(noise: np.ndarray, memory: float) -> np.ndarray:
    """First-order autocorrelated noise of unit variance, from white noise [steps, seeds]."""
    out = noise.copy()
    for step in range(1, len(out)):
        out[step] = memory * out[step - 1] + np.sqrt(1 - memory**2) * noise[step]
    return out


def draw_curves(fall: np.ndarray, jitter: str, seeds: int, rng: np.random.Generator) -> np.ndarray:
    """Return loss curves [steps, seeds]."""
    noise = rng.standard_normal((len(fall), seeds))
    size = np.exp(rng.uniform(np.log(0.006), np.log(0.4), seeds))
    return 0.18 * (1 - size * (fall[:, None] + JITTERS[jitter](noise, fall)))


def stop_dvar(losses: np.ndarray, window: int, eps: float) -> np.ndarray:
    """Steps [seeds] at which DVAR stops on losses [steps, seeds]; CAP where it does not."""
    offset = losses - losses[0]
    sums, squares = (np.vstack([0 * losses[:1], np.cumsum(each, 0)]) for each in (offset, offset**2))
    counts = np.arange(window, len(losses) + 1)[:, None]
    whole = squares[window:] / counts - (sums[window:] / counts) ** 2
    last = (squares[window:] - squares[:-window]) / window - ((sums[window:] - sums[:-window]) / window) ** 2
    return _first(last < eps * whole, window - 1)


def stop_patience(losses: np.ndarray, eps: float, patience: int, every: int) -> np.ndarray:
    scores = -losses[::every]
    best, failures = np.full(losses.shape[1], -np.inf), np.zeros(losses.shape[1], int)
    stops = []
    for score in scores:
        better = score > best + eps
        best, failures = np.where(better, score, best), np.where(better, 0, failures + 1)
        stops.append(failures > patience)
    return _first(np.array(stops), 0, every)


def stop_plateau(
    losses: np.ndarray, share: float, certainty: float, min_checks: int, every: int
) -> np.ndarray:
    checks = np.ascontiguousarray(losses[::every].T)
    stops, running = np.full(len(checks), CAP), np.arange(len(checks))
    for count in range(min_checks, checks.shape[1] + 1):
        done = judge_plateau(checks[running, :count], certainty)[0] < share
        stops[running[done]] = (count - 1) * every
        running = running[~done]
        if not len(running):
            break
    return stops


def _first(stops: np.ndarray, start: int, every: int = 1) -> np.ndarray:
    """The step of the first True of each column [checks, seeds], whose rows begin at the check `start`."""
    return np.where(stops.any(0), np.minimum((stops.argmax(0) + start) * every, CAP), CAP)


@dataclass(frozen=True)
class Rule:
    """A rule for many curves at once, and the same as a stopper of the package."""

    stop: Callable[[np.ndarray], np.ndarray]
    make: Callable[[], Stopper]
    watch: Callable[[np.ndarray], np.ndarray] = lambda curve: curve
    watched: bool = True

    def evaluations(self, stops: np.ndarray) -> np.ndarray:
        """How many times the fixed-input loss was computed."""
        return stops // self.make().every + 1 if self.watched else 0 * stops


def _dvar(method: str) -> Rule:
    settings = PRESETS[method]["dvar"]
    return Rule(lambda losses: stop_dvar(losses, **settings), lambda: DVAR(**settings))


_PLATEAU = Plateau(**PRESETS["textual-inversion"]["plateau"])
_STEPS = PRESETS["textual-inversion"]["budget"]["steps"]
RULES = {
    "plateau": Rule(
        lambda losses: stop_plateau(
            losses, _PLATEAU.share, _PLATEAU.certainty, _PLATEAU.min_checks, _PLATEAU.every
        ),
        lambda: Plateau(**PRESETS["textual-inversion"]["plateau"]),
    ),
    "dvar 310/.15": _dvar("textual-inversion"),
    "dvar 180/.15": _dvar("custom-diffusion"),
    "dvar 440/.4": _dvar("dreambooth-lora"),
    "patience": Rule(
        lambda losses: stop_patience(losses, **PATIENCE, every=50),
        lambda: ClipScore(**PATIENCE, every=50),
        watch=lambda curve: -curve,
    ),
    f"budget {_STEPS}": Rule(
        lambda losses: np.full(losses.shape[1], _STEPS), lambda: Budget(_STEPS, every=_STEPS), watched=False
    ),
}
PUBLISHED = [name for name in RULES if name.startswith("dvar")]


def judge_stops(fall: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return the shares [right, early, late, never] of `stops` [seeds] on a curve without jitter [steps]."""
    best = max(fall.max(), 0)
    reached = [int(np.argmax(fall >= part * best)) if best > 0 else 0 for part in (0.95, 0.99)]
    limit = 2 * max(reached[1], LEAST_STEPS)
    early = stops < reached[0]
    late = ~early & ((stops > limit) | ((best > 0) & (fall[stops] < 0.95 * best)))
    never = late & (stops >= CAP)
    kinds = np.stack([~early & ~late, early, late & ~never, never])
    return kinds.mean(1)


def simulate(seeds: int, first_seed: int) -> list[dict]:
    """Return a row for each shape and jitter, with each rule's outcome shares, steps and evaluations."""
    rows = []
    for held_out, shapes in ((False, SHAPES), (True, HELD_OUT)):
        for number, (shape, fall) in enumerate(shapes.items()):
            for kind, jitter in enumerate(JITTERS):
                rng = np.random.default_rng([first_seed, held_out, number, kind])
                losses = draw_curves(fall, jitter, seeds, rng)
                rules = {}
                for name, rule in RULES.items():
                    stops = rule.stop(losses)
                    rules[name] = {
                        **dict(zip(OUTCOMES, judge_stops(fall, stops).tolist(), strict=True)),
                        "steps": float(stops.mean()),
                        "evaluations": float(rule.evaluations(stops).mean()),
                    }
                rows.append({"shape": shape, "jitter": jitter, "held_out": held_out, "rules": rules})
    return rows


def total(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Means over rows, by rule."""
    return {
        name: {
            key: float(np.mean([row["rules"][name][key] for row in rows])) for key in rows[0]["rules"][name]
        }
        for name in RULES
    }


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _cell(outcome: dict[str, float]) -> str:
    right, *wrong = (_percent(outcome[key]) for key in OUTCOMES)
    return f"{right} ({' / '.join(wrong)})"


def _label(row: dict) -> str:
    return f"{row['shape']}{' *' if row['held_out'] else ''} | {row['jitter']}"


def compare(rows: list[dict], other: str) -> tuple[list[dict], list[dict]]:
    """The rows where plateau stops right clearly more often than `other`, and clearly less often."""
    gaps = [row["rules"]["plateau"]["right"] - row["rules"][other]["right"] for row in rows]
    return (
        [row for row, gap in zip(rows, gaps, strict=True) if gap >= NEAR],
        [row for row, gap in zip(rows, gaps, strict=True) if gap <= -NEAR],
    )


def render(rows: list[dict], seeds: int) -> str:
    """The tables, as Markdown."""
    lines = [f"{seeds} curves a row; percent of stops.", ""]
    parts = (
        ("All shapes", rows),
        ("Shapes it was tuned on, new seeds", [row for row in rows if not row["held_out"]]),
        ("Held-out shapes", [row for row in rows if row["held_out"]]),
    )
    for title, part in parts:
        lines += [
            f"## {title}",
            "",
            "| rule | right | early | late | never | steps (mean) | evaluations (mean) "
            "| rows where plateau is better / equal / worse |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for name, sums in total(part).items():
            better, worse = compare(part, name)
            versus = f"{len(better)} / {len(part) - len(better) - len(worse)} / {len(worse)}"
            shares = " | ".join(_percent(sums[key]) for key in OUTCOMES)
            lines.append(
                f"| {name} | {shares} | {sums['steps']:.0f} | {sums['evaluations']:.0f} "
                f"| {'' if name == 'plateau' else versus} |"
            )
        lines.append("")
    lines += [
        "## Where plateau does not dominate",
        "",
        f"Rows where a published setting is right more often by {_percent(NEAR)} points or more (where the "
        "jitter is large and the fall slow, because it never stops and the cap happens to be right):",
        "",
        "| shape | jitter | plateau: right (early / late / never) | right more often |",
        "|---|---|--:|---|",
    ]
    beaten = {name: [id(row) for row in compare(rows, name)[1]] for name in PUBLISHED}
    for row in rows:
        winners = [name for name in PUBLISHED if id(row) in beaten[name]]
        if winners:
            named = ", ".join(f"{name}: {_percent(row['rules'][name]['right'])}" for name in winners)
            lines.append(f"| {_label(row)} | {_cell(row['rules']['plateau'])} | {named} |")
    lines.append("")
    lines += [
        "## Row by row: right (early / late / never)",
        "",
        f"| shape | jitter | {' | '.join(RULES)} |",
        f"|---|---|{'--:|' * len(RULES)}",
    ]
    for row in rows:
        cells = " | ".join(_cell(row["rules"][name]) for name in RULES)
        lines.append(f"| {_label(row)} | {cells} |")
    return "\n".join([*lines, "", "\\* held-out shape", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="curves a row")
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="print the rows and totals as JSON")
    parser.add_argument("--out", type=Path, help="write there instead of printing")
    arguments = parser.parse_args()
    began = time.process_time()
    rows = simulate(arguments.seeds, arguments.first_seed)
    if arguments.json:
        seconds = round(time.process_time() - began, 1)
        text = json.dumps(
            {"seeds": arguments.seeds, "seconds": seconds, "totals": total(rows), "rows": rows}, indent=1
        )
    else:
        text = render(rows, arguments.seeds)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()

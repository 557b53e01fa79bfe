"""Stopping rules: a curve of losses or scores, one value a check → is there anything left to learn?

`DVAR`, `ClipScore` and `Budget` are published (arXiv 2302.04841); `Plateau`, the default, mends what is wrong
with DVAR. `benchmarks/stopping.py` compares them. The first value is seen before the first training step and
the next ones every `every` steps, so that the n-th comes after (n − 1) · every steps. A rule knows nothing
but its values: given the same curve again, as when a run resumes, it stops at the same place.
"""

import inspect
import math
from collections import deque
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import numpy as np

from t2iprobe.errors import UserError, suggest

__all__ = [
    "DVAR",
    "MAX_STEPS",
    "PRESETS",
    "Budget",
    "Capped",
    "ClipScore",
    "Plateau",
    "Stopper",
    "judge_plateau",
    "make_stopper",
]


class Stopper(Protocol):
    """Whatever says when to stop. Values that are not finite are left out and noted in `is_broken`."""

    @property
    def rule(self) -> str:
        """The rule's name."""

    @property
    def every(self) -> int:
        """Training steps between two values."""

    @property
    def value(self) -> float | None:
        """The statistic that decides, None as long as there is none."""

    @property
    def reason(self) -> str:
        """Why it stopped, in words; empty until then."""

    @property
    def is_broken(self) -> bool:
        """Whether a value was NaN or infinite."""

    def update(self, value: float) -> bool:
        """Take the next value. True: stop now."""


class _Rule:
    """What the rules share: counting, values that are not finite, and the first reason to stop."""

    rule: ClassVar[str] = ""

    def __init__(self, every: int) -> None:
        _require(every >= 1, "every", every, "1 or more training steps")
        self.every = every
        self.updates = 0
        self.value: float | None = None
        self.reason = ""
        self.is_broken = False

    def update(self, value: float) -> bool:
        self.updates += 1
        if not math.isfinite(value):
            self.is_broken = True
            return False
        reason = self._judge(float(value))
        self.reason = self.reason or reason
        return bool(reason)

    def _judge(self, value: float) -> str:
        """Take a finite value; return why to stop now, or an empty string."""
        raise NotImplementedError


class DVAR(_Rule):
    """Stop when the last `window` losses vary little beside all of them: Var(last) / Var(all) < eps.

    Both are population variances, and the window counts losses, not steps (arXiv 2302.04841). As published,
    the ratio rises again along a noisy flat tail, so that the rule may never stop, and losses that are all
    the same give NaN and never stop.
    """

    rule = "dvar"

    def __init__(self, window: int, eps: float, every: int = 1) -> None:
        super().__init__(every)
        _require(window >= 1, "window", window, "1 or more losses")
        _require(eps > 0, "eps", eps, "above 0")
        self.window, self.eps = window, eps
        self.ratio = 1.0  # until the window is full
        self._last: deque[float] = deque(maxlen=window)
        # Welford's sums: a fall of 0.6 % of the loss would drown in sums of squares.
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def _judge(self, value: float) -> str:
        self._last.append(value)
        self._count += 1
        step = value - self._mean
        self._mean += step / self._count
        self._squares += step * (value - self._mean)
        if self._count < self.window:
            return ""
        variance = self._squares / self._count
        self.ratio = float(np.var(self._last)) / variance if variance > 0 else math.nan
        self.value = None if math.isnan(self.ratio) else self.ratio
        if not self.ratio < self.eps:
            return ""
        return f"the last {self.window} losses vary {self.ratio:.3g} times as much as all, below {self.eps:g}"


class ClipScore(_Rule):
    """Stop when more than `patience` scores in a row fail to exceed the best by more than `eps`.

    The scores are likenesses of drawn pictures to the concept's, the higher the better (arXiv 2302.04841).
    """

    rule = "clip"

    def __init__(self, eps: float, patience: int, every: int = 50) -> None:
        super().__init__(every)
        _require(eps >= 0, "eps", eps, "0 or more")
        _require(patience >= 0, "patience", patience, "0 or more scores")
        self.eps, self.patience = eps, patience
        self.best = -math.inf
        self.failures = 0

    def _judge(self, value: float) -> str:
        if value > self.best + self.eps:
            self.best, self.failures = value, 0
        else:
            self.failures += 1
        self.value = float(self.failures)
        if self.failures <= self.patience:
            return ""
        return f"{self.failures} scores in a row were not {self.eps:g} above the best, {self.best:.4g}"


class Budget(_Rule):
    """Stop after a fixed number of training steps, whatever the loss."""

    rule = "budget"

    def __init__(self, steps: int, every: int = 50) -> None:
        super().__init__(every)
        _require(steps >= 1, "steps", steps, "1 or more")
        self.steps = steps

    def _judge(self, value: float) -> str:
        self.value = float(min((self.updates - 1) * self.every, self.steps))
        return f"the budget of {self.steps} steps is spent" if self.value == self.steps else ""


# The window is this part of the checks so far, so that the rule has no time scale of its own: a curve ten
# times as slow is judged on ten times as many checks. A fixed window sees every slow curve as flat.
_WINDOW = 0.5
# A fall of fewer standard deviations of the jitter than this cannot be told from noise, and does not count as
# more: a concept that is not learned at all then stops too.
_JITTERS = 4.0
# A longer memory than this cannot be estimated from a window, and a bend of the curve looks like one.
_MEMORY = 0.8
_LEAST_CHECKS = 8


def judge_plateau(history: np.ndarray, certainty: float = 1.28) -> tuple[np.ndarray, np.ndarray]:
    """Return what may still be gained, as a share of what was, and whether anything was: arrays [...].

    `history` [..., checks] holds the losses of all checks. A line is laid through the last half of them. The
    share's numerator is the line's fall over a window as long, plus `certainty` standard errors, which allow
    for jitter that remembers (first-order autocorrelation of the residuals). Its denominator is the fall from
    the first loss to the window's mean, or four standard deviations of the jitter where that is more: it does
    not shrink along a flat tail, as the variance of the whole curve does. The share is cut to 0..1; a curve
    that is constant gives 0. Neither scale nor offset of the losses matters.
    """
    checks = history.shape[-1]
    size = math.ceil(_WINDOW * checks)
    time = np.arange(size) - (size - 1) / 2
    spread = (time**2).sum()
    window = history[..., checks - size :] - history[..., :1]
    mean = window.mean(-1, keepdims=True)
    slope = (window - mean) @ time / spread
    residuals = window - mean - slope[..., None] * time
    squares = (residuals**2).sum(-1)
    jitter = np.sqrt(squares / (size - 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        memory = 1 - (np.diff(residuals, axis=-1) ** 2).sum(-1) / (2 * squares)
        memory = np.clip(np.nan_to_num(memory), 0, _MEMORY)
        error = size * jitter / np.sqrt(spread) * np.sqrt((1 + memory) / (1 - memory))
        left = certainty * error - size * slope
        gained = -mean[..., 0]
        share = np.nan_to_num(left / np.maximum(gained, _JITTERS * jitter), posinf=1.0, neginf=0.0)
    return np.clip(share, 0, 1), gained > _JITTERS * jitter


class Plateau(_Rule):
    """Stop when another window of training would gain less than `share` of what was gained so far.

    What may be gained is an upper bound from the slope of the last half of the checks and its standard error
    (`judge_plateau`); `value` is its share of the fall so far. The defaults, from the simulation in
    `benchmarks/stopping.py`: a share of 0.05 stops an exponential decay at about six time constants; 1.28
    standard errors (90 %, one-sided) keep stops too early rarer than with 1 and as many in all right; 30
    checks of every tenth step are about the steps that the published window waits for, and fewer are too few
    to tell a slow fall from none.
    """

    rule = "plateau"

    def __init__(
        self, share: float = 0.05, certainty: float = 1.28, min_checks: int = 30, every: int = 10
    ) -> None:
        super().__init__(every)
        _require(0 < share < 1, "share", share, "between 0 and 1")
        _require(certainty >= 0, "certainty", certainty, "0 or more standard errors")
        _require(min_checks >= _LEAST_CHECKS, "min_checks", min_checks, f"{_LEAST_CHECKS} or more")
        self.share, self.certainty, self.min_checks = share, certainty, min_checks
        self._history: list[float] = []

    def _judge(self, value: float) -> str:
        self._history.append(value)
        if len(self._history) < self.min_checks:
            return ""
        share, learned = judge_plateau(np.array(self._history), self.certainty)
        self.value = float(share)
        if self.value >= self.share:
            return ""
        if not learned:
            return f"{len(self._history)} checks show no fall that can be told from jitter, and no slope"
        return (
            f"flat: the next {math.ceil(_WINDOW * len(self._history))} checks would gain at most "
            f"{self.value:.1%} of what was gained so far, below {self.share:.1%}"
        )


class Capped:
    """A stopper that stops after `max_steps` training steps at the latest, broken values or not."""

    def __init__(self, stopper: Stopper, max_steps: int) -> None:
        _require(max_steps >= 1, "max_steps", max_steps, "1 or more")
        self.stopper, self.max_steps = stopper, max_steps
        self.updates = 0

    @property
    def rule(self) -> str:
        return self.stopper.rule

    @property
    def every(self) -> int:
        return self.stopper.every

    @property
    def value(self) -> float | None:
        return self.stopper.value

    @property
    def is_broken(self) -> bool:
        return self.stopper.is_broken

    @property
    def _is_reached(self) -> bool:
        return (self.updates - 1) * self.every >= self.max_steps

    @property
    def reason(self) -> str:
        cap = f"the cap of {self.max_steps} steps is reached" if self._is_reached else ""
        return self.stopper.reason or cap

    def update(self, value: float) -> bool:
        self.updates += 1
        return self.stopper.update(value) or self._is_reached


RULES: dict[str, type[_Rule]] = {rule.rule: rule for rule in (Plateau, DVAR, ClipScore, Budget)}

# Method → rule → settings. DVAR, CLIP score and few iterations as published; the plateau rule can stop
# after thirty checks at the earliest: half to the whole of the published windows.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "textual-inversion": {
        "plateau": {"every": 5},
        "dvar": {"window": 310, "eps": 0.15},
        "clip": {"eps": 0.02, "patience": 6},
        "budget": {"steps": 475},
    },
    "custom-diffusion": {
        "plateau": {"every": 6},
        "dvar": {"window": 180, "eps": 0.15},
        "clip": {"eps": 0.02, "patience": 6},
        "budget": {"steps": 367},
    },
    "dreambooth-lora": {
        "plateau": {"every": 10},
        "dvar": {"window": 440, "eps": 0.4},
        "clip": {"eps": 0.04, "patience": 3},
        "budget": {"steps": 450},
    },
}
MAX_STEPS = {"textual-inversion": 6100, "custom-diffusion": 500, "dreambooth-lora": 1000}


def make_stopper(rule: str, method: str, max_steps: int | None = None, **options: Any) -> Capped:
    """Return a method's stopper with its published settings, or `options` instead, and a hard cap.

    Without `max_steps` the cap is the published one; with it, it is also the budget, unless `steps` is given.
    DVAR's published window counts losses of every step: with another `every` it is divided by it.
    Raises UserError for a rule, method or option that does not exist, or a value that cannot be.
    """
    if method not in PRESETS:
        raise UserError(f"there is no method {method!r}: choose {_listed(PRESETS)}{suggest(method, PRESETS)}")
    if rule not in RULES:
        raise UserError(f"there is no stopping rule {rule!r}: choose {_listed(RULES)}{suggest(rule, RULES)}")
    settings = PRESETS[method][rule] | options
    if rule == "budget" and max_steps is not None and "steps" not in options:
        settings["steps"] = max_steps
    if rule == "dvar" and "window" not in options:
        settings["window"] = max(1, round(settings["window"] / max(1, settings.get("every", 1))))
    known = inspect.signature(RULES[rule]).parameters
    for name in options:
        if name not in known:
            raise UserError(f"the stopping rule {rule} has no setting {name!r}: choose {_listed(known)}")
    return Capped(RULES[rule](**settings), MAX_STEPS[method] if max_steps is None else max_steps)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise UserError(f"the stopping rule's {name} is {value}: it must be {wanted}")

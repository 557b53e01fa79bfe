import math
from itertools import pairwise

import numpy as np
import pytest
from benchmark_files import load_benchmark

from t2iprobe.errors import UserError
from t2iprobe.inversion.stopping import (
    DVAR,
    MAX_STEPS,
    PRESETS,
    Budget,
    Capped,
    ClipScore,
    Plateau,
    Stopper,
    judge_plateau,
    make_stopper,
)


def first_stop(stopper: Stopper, values: np.ndarray | list[float]) -> int | None:
    return next((count for count, value in enumerate(values, 1) if stopper.update(value)), None)


def decay(checks: int, scale: float, jitter: float, seed: int = 0) -> np.ndarray:
    """A fall by 1 from 1 with a time constant of `scale` checks, and white jitter."""
    noise = jitter * np.random.default_rng(seed).standard_normal(checks)
    return np.exp(-np.arange(checks) / scale) + noise


@pytest.mark.parametrize("window", [1, 2, 7, 31])
def test_dvar_is_the_ratio_of_numpy_variances(window: int) -> None:
    rng = np.random.default_rng(window)
    losses = 0.18 + 1e-4 * rng.standard_normal(200).cumsum()
    rule = DVAR(window, 0.15)
    for count, loss in enumerate(losses, 1):
        stop = rule.update(loss)
        if count < max(window, 2):
            assert not stop or window == 1
            continue
        ratio = losses[count - window : count].var() / losses[:count].var()
        assert rule.ratio == pytest.approx(ratio, rel=1e-9, abs=1e-12)
        assert stop == (ratio < 0.15)


def test_dvar_is_exact_far_from_zero() -> None:
    # Differences of 1e-6 on losses of 1000: sums of squares in float64 would be off by a tenth.
    losses = 1000 + 1e-6 * decay(600, 60, 0.05)
    rule = DVAR(100, 0.15)
    for loss in losses:
        rule.update(loss)
    assert rule.ratio == pytest.approx((losses[-100:] - 1000).var() / (losses - 1000).var(), rel=1e-6)


def test_dvar_keeps_the_published_faults() -> None:
    constant = DVAR(10, 0.15)
    assert first_stop(constant, [0.181] * 50) is None
    assert math.isnan(constant.ratio)
    assert constant.value is None
    assert first_stop(DVAR(310, 0.15), decay(6000, 120, 0.2)) is None


def test_clip_score_waits_for_more_than_patience_failures_in_a_row() -> None:
    assert first_stop(ClipScore(0.1, 2), [0.5, 0.6, 0.55, 0.75, 0.5, 0.8, 0.75, 0.9]) == 7
    rule = ClipScore(0.0, 0)
    assert not rule.update(0.5)
    assert rule.update(0.5)
    assert rule.value == 1
    assert rule.reason == "1 scores in a row were not 0 above the best, 0.5"


def test_a_budget_counts_steps_from_the_value_before_training() -> None:
    rule = Budget(100, every=25)
    assert first_stop(rule, [1.0] * 9) == 5
    assert rule.value == 100
    assert rule.reason == "the budget of 100 steps is spent"
    # A last value off the grid, at step 110 after 100: stops all the same.
    assert first_stop(Budget(110, every=25), [1.0] * 9) == 6


@pytest.mark.parametrize("rule", ["plateau", "dvar", "clip", "budget"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_every_rule_has_a_hard_cap_and_survives_broken_values(rule: str, broken: float) -> None:
    stopper = make_stopper(rule, "textual-inversion", 700)
    rising = [-float(i) if rule != "clip" else float(i) for i in range(2000)]
    assert first_stop(stopper, rising) == 700 // stopper.every + 1
    assert stopper.rule == rule
    assert "700 steps" in stopper.reason
    assert not stopper.is_broken

    stopper = make_stopper(rule, "textual-inversion", 700)
    assert stopper.reason == ""
    assert stopper.value is None
    assert first_stop(stopper, [broken] * 2000) == 700 // stopper.every + 1
    assert stopper.is_broken


@pytest.mark.parametrize("fault", [math.nan, -math.inf])
def test_a_broken_value_changes_nothing_but_is_noted(fault: float) -> None:
    losses = decay(200, 10, 0.02)
    whole, holed = Plateau(), Plateau()
    stop = first_stop(whole, losses)
    assert first_stop(holed, [*losses[:20], fault, *losses[20:]]) == stop + 1
    assert holed.is_broken
    assert not whole.is_broken


def test_plateau_is_the_slope_and_its_error_by_hand() -> None:
    history = decay(41, 8, 0.05)
    window = history[-21:]
    (slope, offset), covariance = np.polyfit(np.arange(21), window, 1, cov=True)
    residuals = window - slope * np.arange(21) - offset
    changes = sum((after - before) ** 2 for before, after in pairwise(residuals))
    memory = max(1 - changes / 2 / sum(residuals**2), 0)
    error = math.sqrt(covariance[0, 0]) * math.sqrt((1 + memory) / (1 - memory))
    share, learned = judge_plateau(history, certainty=1.5)
    assert learned
    assert share == pytest.approx(21 * (1.5 * error - slope) / (history[0] - window.mean()), rel=1e-9)


def test_plateau_judges_many_curves_as_each_alone() -> None:
    curves = np.stack([decay(50, scale, 0.1, seed) for seed, scale in enumerate((3, 10, 40, 1e9))])
    share, learned = judge_plateau(curves)
    alone = [judge_plateau(curve) for curve in curves]
    assert np.allclose(share, [each for each, _ in alone], rtol=1e-12)
    assert learned.tolist() == [bool(each) for _, each in alone]


@pytest.mark.parametrize("jitter", [0.0, 0.03, 0.2])
@pytest.mark.parametrize("scale", [3, 20, 80])
def test_plateau_knows_neither_scale_nor_offset(scale: float, jitter: float) -> None:
    losses = decay(600, scale, jitter)
    stop = first_stop(Plateau(), losses)
    assert stop is not None
    for factor, offset in ((6e-3, 1.0), (1e3, 0.0), (1.0, -50.0)):
        assert first_stop(Plateau(), factor * losses + offset) == stop


@pytest.mark.parametrize("scale", [5, 20, 60, 100])
def test_plateau_stops_a_decay_between_four_and_nine_time_constants(scale: float) -> None:
    stops = [first_stop(Plateau(), decay(1000, scale, 0.02, seed)) for seed in range(10)]
    assert min(stops) >= max(30, 4 * scale)
    assert max(stops) <= max(60, 9 * scale)


@pytest.mark.parametrize("jitter", [0.0, 0.02])
def test_plateau_goes_on_while_the_loss_falls(jitter: float) -> None:
    for seed in range(10):
        noise = np.random.default_rng(seed).standard_normal(600)
        assert first_stop(Plateau(), -np.linspace(0, 1, 600) + jitter * noise) is None
        assert first_stop(Plateau(), decay(600, 400, jitter, seed)) is None


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_plateau_stops_where_nothing_is_learned(memory: float) -> None:
    for seed in range(20):
        noise = np.random.default_rng(seed).standard_normal(600)
        for i in range(1, 600):
            noise[i] = memory * noise[i - 1] + math.sqrt(1 - memory**2) * noise[i]
        stopper = Plateau()
        assert first_stop(stopper, 1 + 0.01 * noise) is not None


def test_plateau_stops_on_constant_and_rising_curves_without_nan() -> None:
    with np.errstate(all="raise"):
        for losses in ([0.181] * 50, list(np.linspace(1, 2, 50)), [1.0] + [0.9] * 49):
            stopper = Plateau()
            assert first_stop(stopper, losses) == 30
            assert stopper.value == pytest.approx(0, abs=1e-12)
    stopper = Plateau()
    first_stop(stopper, [0.181] * 50)
    assert stopper.reason == "30 checks show no fall that can be told from jitter, and no slope"


def test_plateau_says_why() -> None:
    stopper = Plateau(min_checks=10)
    stop = first_stop(stopper, decay(400, 20, 0.0))
    assert stopper.reason == (
        f"flat: the next {math.ceil(stop / 2)} checks would gain at most {stopper.value:.1%} "
        "of what was gained so far, below 5.0%"
    )


@pytest.mark.parametrize("min_checks", [8, 30, 100])
def test_plateau_never_stops_before_its_least_checks(min_checks: int) -> None:
    stopper = Plateau(min_checks=min_checks)
    for loss in [1.0] * (min_checks - 1):
        assert not stopper.update(loss)
        assert stopper.value is None
    assert stopper.update(1.0)


@pytest.mark.parametrize("rule", ["plateau", "dvar"])
def test_a_replayed_curve_stops_at_the_same_place(rule: str) -> None:
    losses = 0.18 + 1e-3 * decay(1000, 60, 0.02)
    first, again = (make_stopper(rule, "textual-inversion", every=1) for _ in range(2))
    stop = first_stop(first, losses)
    assert stop is not None
    for loss in losses[: stop // 2]:
        again.update(float(loss))  # as after reading it from a file
    assert first_stop(again, losses[stop // 2 :]) == stop - stop // 2
    assert (again.value, again.reason) == (first.value, first.reason)


@pytest.mark.parametrize("method", PRESETS)
def test_published_settings(method: str) -> None:
    rules = {rule: make_stopper(rule, method).stopper for rule in PRESETS[method]}
    window, eps, patience, clip_eps, steps, cap = {
        "textual-inversion": (310, 0.15, 6, 0.02, 475, 6100),
        "custom-diffusion": (180, 0.15, 6, 0.02, 367, 500),
        "dreambooth-lora": (440, 0.4, 3, 0.04, 450, 1000),
    }[method]
    assert (rules["dvar"].window, rules["dvar"].eps, rules["dvar"].every) == (window, eps, 1)
    assert (rules["clip"].patience, rules["clip"].eps, rules["clip"].every) == (patience, clip_eps, 50)
    assert rules["budget"].steps == steps
    assert make_stopper("plateau", method).max_steps == MAX_STEPS[method] == cap


def test_options_replace_settings() -> None:
    assert make_stopper("budget", "textual-inversion", 120).stopper.steps == 120
    assert make_stopper("budget", "textual-inversion", 120, steps=80).stopper.steps == 80
    assert make_stopper("dvar", "textual-inversion", every=10).stopper.window == 31
    assert make_stopper("dvar", "textual-inversion", every=10, window=50).stopper.window == 50
    assert make_stopper("plateau", "custom-diffusion", share=0.1).stopper.share == 0.1


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: make_stopper("platau", "textual-inversion"), "did you mean plateau?"),
        (lambda: make_stopper("plateau", "lora"), "there is no method 'lora': choose textual-inversion"),
        (lambda: make_stopper("dvar", "textual-inversion", share=1), "no setting 'share': choose window"),
        (lambda: make_stopper("dvar", "textual-inversion", every=0), "every is 0: it must be 1 or more"),
        (lambda: DVAR(0, 0.15), "window is 0"),
        (lambda: DVAR(10, 0.0), "eps is 0.0"),
        (lambda: ClipScore(-0.1, 3), "eps is -0.1"),
        (lambda: ClipScore(0.1, -1), "patience is -1"),
        (lambda: Budget(0), "steps is 0"),
        (lambda: Capped(Budget(1), 0), "max_steps is 0"),
        (lambda: Plateau(share=1.0), "share is 1.0"),
        (lambda: Plateau(certainty=-1.0), "certainty is -1.0"),
        (lambda: Plateau(min_checks=7), "min_checks is 7"),
    ],
)
def test_bad_settings_are_told_in_a_line(call, told: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def benchmark():
    return load_benchmark("stopping")


@pytest.mark.parametrize("jitter", ["white 3 %", "memory 100"])
def test_the_benchmark_applies_the_rules_as_they_are(benchmark, jitter: str) -> None:
    for name in ("decay 100", "falls and rises", "nothing"):
        losses = benchmark.draw_curves(benchmark.SHAPES[name], jitter, 2, np.random.default_rng(5))
        for rule in benchmark.RULES.values():
            stops = rule.stop(losses)
            for curve, stop in zip(losses.T, stops, strict=True):
                stopper = rule.make()
                values = rule.watch(curve[:: stopper.every])
                count = first_stop(stopper, values)
                assert stop == (benchmark.CAP if count is None else (count - 1) * stopper.every)

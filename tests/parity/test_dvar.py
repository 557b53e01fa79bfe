"""The published stopping rules (arXiv 2302.04841): every ratio to 1e-8, every stop."""

import gzip
import json
from pathlib import Path

import pytest

from t2iprobe.inversion.stopping import DVAR, ClipScore, Stopper

PUBLISHED = json.loads(gzip.decompress((Path(__file__).parent / "dvar_parity.json.gz").read_bytes()))


def first_stop(stopper: Stopper, values: list[float]) -> int | None:
    return next((count for count, value in enumerate(values, 1) if stopper.update(value)), None)


@pytest.mark.parametrize("trace", PUBLISHED["var"], ids=lambda trace: f"{trace['window']}-{trace['eps']}")
def test_dvar(trace: dict) -> None:
    rule = DVAR(trace["window"], trace["eps"])
    assert rule.ratio == 1.0

    stops, ratios = [], []
    for count, loss in enumerate(trace["losses"], 1):
        if rule.update(loss):
            stops.append(count)
        ratios.append(rule.ratio)

    assert (stops[0] if stops else None) == trace["stop_after"]
    assert ratios[: trace["window"] - 1] == [1.0] * (trace["window"] - 1)
    for count, ratio in trace["ratio"].items():
        assert ratios[int(count) - 1] == pytest.approx(ratio, abs=1e-8, rel=0)


@pytest.mark.parametrize("trace", PUBLISHED["clip"], ids=lambda trace: f"{trace['eps']}-{trace['patience']}")
def test_clip_score(trace: dict) -> None:
    assert first_stop(ClipScore(trace["eps"], trace["patience"]), trace["scores"]) == trace["stop_after"]

"""The benchmark of adaptive sampling: its truths are what they say, and a rule that misses is told."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from benchmark_files import load_benchmark
from report_example import make_run


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_benchmark("adaptive")


def test_truths_have_the_means_and_variances_that_are_stated(bench: ModuleType, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["dog.n.01", "bird.n.01", "acarine.n.01"], samples=5, pictures=False)
    for name, (draw, means, variances, _) in bench.make_truths(run.path).items():
        values = draw(np.random.default_rng(0), 2000)
        assert values.shape == (len(means), 2000)
        assert 0 <= values.min() <= values.max() <= 1
        assert values.mean() == pytest.approx(means.mean(), rel=0.02), name
        assert values.var(axis=1).mean() == pytest.approx(variances.mean(), rel=0.05), name


def test_a_row_tells_coverage_and_pictures(bench: ModuleType) -> None:
    draw, means, variances, (half_width,) = bench.make_truths(None)["40 words, hits"]
    found = bench.replay(draw, float(means.mean()), half_width, 60, 160)
    wrong = bench.replay(draw, float(means.mean()) + 2 * half_width, half_width, 20, 160)

    assert found["reached"] == 1
    assert found["coverage"] >= 0.85
    assert wrong["coverage"] < 0.2
    equal = bench.Z**2 * variances.mean() / (40 * half_width**2)
    assert found["units"] / 40 == pytest.approx(equal, rel=0.25)

"""The benchmark of the probe: its peers do the same work, its verdicts can say no, it runs and continues."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from t2iprobe.errors import UserError
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.metrics import measure
from t2iprobe.testing import tiny_pipeline

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _find_benchmarks() -> Iterator[None]:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_published_metrics_are_ours() -> None:
    peers, hierarchy = load("probe_peers"), Hierarchy.imagenet()
    rng = np.random.default_rng(0)
    names = ["dog.n.01", "fruit.n.01", "tabby.n.01", "vehicle.n.01"]
    logits = {name: 3 * rng.standard_normal((5, 1000)).astype(np.float32) for name in names}
    published, ours = peers.PublishedMetrics(hierarchy.classes), measure(logits, hierarchy)
    columns = (ours.isp, ours.scs_raw, ours.subtree_entropy, ours.marginal_entropy)
    for metric, column in zip(peers.METRICS, columns, strict=True):
        found = published.measure(metric, logits)
        expected = {name: v for name, v in zip(ours.synsets, column, strict=True) if not np.isnan(v)}
        assert found == pytest.approx(expected, abs=1e-5)
        assert len(found) == (4 if metric == "isp" else 3)  # tabby is one class


def made_up(**changes: Any) -> dict[str, bool]:
    """Verdicts, by their claims, of made-up figures."""
    report = load("probe_report")
    given = {
        "stock": 10.0,
        "ours": 70.0,
        "compiled": 90.0,
        "agree": 0.999,
        "theirs": 30.0,
        "predicted": 11.0,
        "off": 1e-6,
    }
    given |= {"gpu": False, "peak": 1000.0} | changes
    kept: dict[str, Any] = {}
    for turn in range(5):
        for name in ("stock", "ours", "compiled"):
            kept[f"pictures/4/{turn}/{name}"] = {
                "pictures": 8, "seconds": 8 / given[name] * (1 + 0.01 * turn), "judges_agree": given["agree"],
                "batch": 4, "lanes": 2,
            }  # fmt: skip
    work = {"denoiser": 8.0, "decoder": 1.0, "judge": 1.0}
    kept["parts"] = {
        "milliseconds": {"denoiser": 8.0, "decoder": 2.0, "judge": 2.0, "scheduler and copies": 1.0},
        "gflop": work, "peak_gflops": given["peak"], "samples": 4,
    }  # fmt: skip
    kept["metrics"] = {
        "synsets": 860, "samples": 32, "theirs": {"isp": given["theirs"]}, "ours": [0.2, 0.21, 0.2],
        "off": given["off"],
    }  # fmt: skip
    kept["prediction/0"] = {"pictures": 4, "predicted": given["predicted"], "seconds": 10.0, "parts": {}}
    found = report.compare(kept)
    found["setting"] = {
        "model": "m", "device": "d", "threads": 2, "steps": 25, "guidance": 3.0, "scheduler": "DDIMScheduler",
        "dtype": "bfloat16", "stock_dtype": "float32", "pictures": 8, "turns": 5, "on_gpu": given["gpu"],
    }  # fmt: skip
    found["verdicts"] = report.judge(found)
    text = report.table(found)
    assert "| 4 | 9.8" in text
    assert ("would take" in text) == given["gpu"]
    assert found["parts"]["ours_of_peak"]["value"] == pytest.approx(given["ours"] / 1.02 * 10 / given["peak"])
    return {verdict["claim"]: verdict["holds"] for verdict in found["verdicts"]}


def test_verdicts_can_say_yes_and_no() -> None:
    assert all(made_up().values())
    times = "at least 6 times the stock loop, 4 pictures a synset"
    assert made_up(ours=59.0)[times] is False
    assert made_up(ours=59.0)[f"{times}, compiled"] is True
    assert made_up(compiled=59.0)[f"{times}, compiled"] is False
    assert made_up(agree=0.9)["both judges say the same of the same pictures"] is False
    assert (
        made_up(theirs=15.0)["metrics from logits at least 100 times as fast as the published way"] is False
    )
    assert made_up(off=1e-3)["and the same values"] is False
    assert made_up(predicted=12.5)["--dry-run within 20% of the run"] is False
    assert made_up(predicted=7.5)["--dry-run within 20% of the run"] is False
    peak = "at least 55% of the matrix peak measured in the same run"
    assert peak not in made_up()
    assert made_up(gpu=True)[peak] is True
    assert made_up(gpu=True, peak=1400.0)[peak] is False
    assert made_up(gpu=True, ours=19.0)["at least 2 times the stock loop, 4 pictures a synset"] is False


def test_the_benchmark_runs_and_continues(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = load("probe")
    arguments = ["--quick", "--model", str(tiny_model), "--set", "steps=2", "--samples", "2"]
    arguments += ["--contestants", "stock", "ours"]
    arguments += ["--parts", "pictures", "parts", "metrics"]
    arguments += ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "found.json")]
    probe.main(arguments)
    first = json.loads((tmp_path / "found.json").read_text())
    assert "| 2 | " in capsys.readouterr().out
    row = first["rates"]["2"]
    assert row["pictures"] == 12
    assert row["ours_times"]["value"] > 0
    assert row["judges_agree"] > 0.9  # of noise
    assert set(first["parts"]["gflop"]) == {"denoiser", "decoder", "judge"}
    assert 0 < first["parts"]["ours_of_peak"]["value"] < 1
    assert first["metrics"]["off"] < 1e-4
    kept = json.loads((tmp_path / "work" / "found.json").read_text())
    del kept["pictures/2/1/ours"]  # as if it had been killed there
    (tmp_path / "work" / "found.json").write_text(json.dumps(kept))
    probe.main(arguments)
    again = json.loads((tmp_path / "work" / "found.json").read_text())
    assert again | kept == again
    assert "pictures/2/1/ours" in again
    with pytest.raises(UserError, match="another model or other settings"):
        probe.main([*arguments, "--set", "steps=3"])


def test_the_path_of_a_gpu_runs_with_tiny_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probe, tiny = load("probe"), tiny_pipeline()
    monkeypatch.setattr(probe, "make_sd15", lambda: ((tiny.unet, tiny.vae, [tiny.text_encoder]), 32))
    words = ["--quick", "--shape", "sd15", "--set", "steps=2", "--set", "size=32", "--samples", "1"]
    words += ["--contestants", "stock", "ours"]
    words += ["--parts", "pictures", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "found.json")]
    probe.main(words)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["setting"]["model"] == "SD 1.5's shape, random weights"
    assert (found["setting"]["steps"], found["setting"]["guidance"]) == (2, 7.5)
    assert found["rates"]["1"]["ours"]["value"] > 0
    assert "SD 1.5's shape" in capsys.readouterr().out


def test_compiled_networks_take_their_turns(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_, compiled = torch.compile, []

    def trace_only(function: Any) -> Any:  # kernels take a minute, and are tested elsewhere
        compiled.append(function)
        return compile_(function, backend="eager")

    monkeypatch.setattr(torch, "compile", trace_only)
    words = ["--quick", "--model", str(tiny_model), "--set", "steps=2", "--samples", "2"]
    words += ["--parts", "pictures", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "found.json")]
    load("probe").main(words)
    row = json.loads((tmp_path / "found.json").read_text())["rates"]["2"]
    assert row["compiled"]["value"] > 0
    assert row["compiled_times"]["value"] > 0
    assert len(compiled) == 1
    assert "2 pictures a synset, compiled" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_is_predicted(tiny_model: Path, tmp_path: Path) -> None:
    probe = load("probe")
    words = ["--quick", "--model", str(tiny_model), "--set", "steps=2", "--parts", "prediction"]
    probe.main([*words, "--work", str(tmp_path / "work"), "--json", str(tmp_path / "found.json")])
    (row,) = json.loads((tmp_path / "found.json").read_text())["predictions"]
    assert row["pictures"] == 12
    assert row["predicted"] == pytest.approx(row["seconds"], rel=0.6)  # of a few seconds, on a busy machine

"""Compiled networks draw the same, in any lane and batch, and where they cannot, plain ones do."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from real_command import call
from small_networks import PLAN, make_sampler, run, suited_unet
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from t2iprobe.compiling import compile_networks, stop_compiling
from t2iprobe.runs import Run
from t2iprobe.testing import tiny_pipeline


def test_where_compiling_fails_drawing_goes_on_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=refuse, dynamic=False))
    sampler = make_sampler(compiled=True, lanes=1)
    with pytest.warns(UserWarning, match="torch.compile does not work here, drawing goes on without") as told:
        drawn = sampler.sample(PLAN)
    assert len([each for each in told if "torch.compile" in str(each.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = sampler.sample(PLAN)
    for pictures in (drawn, again):
        assert all(np.array_equal(a, b) for a, b in zip(pictures, make_sampler().sample(PLAN), strict=True))


def test_an_offloaded_network_is_offloaded_again_where_compiling_fails() -> None:
    pipeline = tiny_pipeline("sd")
    calls = []
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda *given, **named: calls.append(1) or forward(*given, **named)
    hooked = pipeline.unet.forward
    compile_networks(pipeline)
    assert pipeline.unet.forward is not hooked
    with pytest.warns(UserWarning, match="drawing goes on without: no compiler"):
        stop_compiling(pipeline, RuntimeError("no compiler"))
    assert pipeline.unet.forward is hooked


def test_lanes_compile_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager"))
    plain, suited, batch = suited_unet()
    compile_networks(SimpleNamespace(unet=suited))
    counters.clear()
    expected = {time: run(plain, batch, time) for time in (10, 300, 500)}

    def work(_: int) -> list[torch.Tensor]:
        own = {name: part.clone() for name, part in batch.items()}
        return [run(suited, own, time) for time in expected]

    with ThreadPoolExecutor(3) as pool:
        drawn = list(pool.map(work, range(12)))
    for made in drawn:
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(made, expected.values(), strict=True))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compiled_networks_draw_the_same() -> None:
    drawn = np.stack(make_sampler(compiled=True, lanes=1).sample(PLAN)).astype(int)
    assert np.abs(drawn - np.stack(make_sampler().sample(PLAN))).max() <= 1


@pytest.mark.slow
def test_a_compiled_unet_shares_halves_keeps_projections_and_takes_any_batch() -> None:
    plain, suited, batch = suited_unet()
    compile_networks(SimpleNamespace(unet=suited))
    counters.clear()
    assert torch.allclose(run(suited, batch), run(plain, batch), atol=1e-4)
    lone = torch.randn(3, plain.config.in_channels, 8, 8)
    larger = {"sample": torch.cat([lone, lone]), "encoder_hidden_states": torch.randn(6, 7, 32)}
    assert torch.allclose(run(suited, larger), run(plain, larger), atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        run(suited, larger, 500)
    called = {event.key: event.count for event in watched.key_averages()}
    assert "mkldnn::_convolution_pointwise" in called  # with weights that were laid out once
    assert "aten::mkldnn_convolution" not in called


@pytest.mark.slow
def test_a_run_that_is_compiled_judges_as_one_that_is_not(tiny_model: Path, tmp_path: Path) -> None:
    words = ["hypernymy", "run", "--model", tiny_model, "--synsets", "dog.n.01,bird.n.01", "--samples", "3"]
    words += ["--steps", "2", "--set", "classifier_dtype=float32", "--json"]
    ways = {"exact": ["--dtype", "float32"], "plain": ["--dtype", "bfloat16"]}
    ways["compiled"] = [*ways["plain"], "--compile"]
    logits = {}
    for name, way in ways.items():
        done = call(*words, *way, "--out", tmp_path / name)
        assert json.loads(done.out)["configuration"]["compile"] is (name == "compiled")
        assert "goes on without" not in done.err
        logits[name] = np.concatenate(list(Run.open(tmp_path / name).logits().values()))
    # Both round to bfloat16, at other places: neither is further from float32 than the other.
    rounding = {name: np.abs(logits[name] - logits["exact"]).mean() for name in ("plain", "compiled")}
    assert 0 < rounding["compiled"] < 1.25 * rounding["plain"]
    assert not np.array_equal(logits["plain"], logits["compiled"])

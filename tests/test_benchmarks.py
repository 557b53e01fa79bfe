"""The benchmark of trainings: FLOPs against published counts, its references, its clocks, its verdicts."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from concept_pictures import draw_concept

from t2iprobe.inversion.commands import load_backbone, load_training, read_concept

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Any:
    """The module benchmarks/inversion.py."""
    sys.path.insert(0, str(FOLDER))
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        spec = importlib.util.spec_from_file_location("benchmarks_inversion", FOLDER / "inversion.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        os.environ.pop("XDG_CACHE_HOME", None)
        if cache is not None:
            os.environ["XDG_CACHE_HOME"] = cache


# GFLOP of one item at SD 1.5's and SDXL's size, counted elsewhere; TFLOP a step from them.
PARTS = {
    "SD 1.5, 512²": {
        "denoise": 803,
        "encode a picture": 1117,
        "encode a text": 13.3,
        "encode a text, gradient to the rows": 26.8,
        "denoise, gradient to the text": 1669,
    },
    "SDXL, 1024²": {
        "denoise": 6761,
        "encode a picture": 4879,
        "denoise, gradient to the text": 14024,
    },
}
STEPS = {
    "published DVAR": 8.89,
    "… moments cached": 6.66,
    "… and a look every 5": 4.05,
    "… or every 10": 3.72,
}


@pytest.mark.slow
@pytest.mark.parametrize("size", PARTS)
def test_flops_are_those_counted_elsewhere(bench: ModuleType, size: str) -> None:
    parts = bench.count_parts(size)
    for name, expected in PARTS[size].items():
        assert parts[name] / 1e9 == pytest.approx(expected, rel=0.02), name


def test_steps_cost_what_was_computed_elsewhere(bench: ModuleType) -> None:
    from inversion_flops import cost_step, list_procedures

    parts = {name: 1e9 * value for name, value in PARTS["SD 1.5, 512²"].items()}
    procedures = list_procedures()
    for name, expected in STEPS.items():
        assert cost_step(parts, *procedures[name]) / 1e12 == pytest.approx(expected, rel=0.02), name
    plain = cost_step(parts, 2, True, 0, 1)
    assert plain / 1e12 == pytest.approx(5.63, rel=0.02)


def test_counts_include_attention(bench: ModuleType) -> None:
    one = torch.randn(1, 2, 8, 4)
    counted = bench.count(lambda: torch.nn.functional.scaled_dot_product_attention(one, one, one))
    assert counted == 2 * (2 * 2 * 8 * 8 * 4)


def make_reference(bench: ModuleType, model: Path, folder: Path, letter: str) -> Any:
    settings = load_training({"model": str(model), "dtype": "float32"})
    backbone = load_backbone(settings)
    concept = read_concept(folder, "<cat>", settings, backbone)
    kind = {"a": bench.Stock, "b": bench.PublishedDVAR}[letter]
    return type("Short", (kind,), {"most": 6})(backbone, concept, "t", 0)


@pytest.mark.parametrize("letter", "ab")
def test_references_train_one_row_and_continue_as_if_never_stopped(
    bench: ModuleType, letter: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = draw_concept(tmp_path / "cat")
    learner = make_reference(bench, tiny_model, folder, letter)
    first = learner.row()
    vocabulary = learner.encoder.get_input_embeddings().weight.detach().clone()
    while not learner.step():
        if learner.done == 3:
            torch.save(learner.state(), tmp_path / "state.pt")
    assert learner.done == 6
    assert learner.reason
    assert (learner.row() - first).abs().max() > 0
    changed = (learner.encoder.get_input_embeddings().weight != vocabulary).any(1)
    assert changed.nonzero().flatten().tolist() == ([learner.first] if letter == "a" else [])
    continued = make_reference(bench, tiny_model, folder, letter)
    continued.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    while not continued.step():
        pass
    assert torch.equal(continued.row(), learner.row())
    if letter == "b":
        assert continued.curve == learner.curve
        assert len(set(learner.curve)) == 6


def test_reference_steps_are_relative_to_the_vocabulary(
    bench: ModuleType, tiny_model: Path, tmp_path: Path
) -> None:
    learner = make_reference(bench, tiny_model, draw_concept(tmp_path / "cat"), "a")
    rms = float(learner.original.square().mean().sqrt())
    (group,) = learner.optimizer.param_groups
    assert group["lr"] == pytest.approx(1e-4 * rms / 0.014, rel=1e-2)  # its new row is among the entries
    assert group["lr"] * group["weight_decay"] == pytest.approx(1e-6)


# An arm that sleeps so many times so long, on a clock of the benchmark's.
SLEEPER = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from inversion import Clock, Unit
letter, passes, seconds, out = sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
clock = Clock()
clock.wait()
clock.running = Unit(letter, 0, ["x"])
clock.begin()
for _ in range(passes):
    time.sleep(seconds)
    with open(out, "a") as file:
        file.write(letter)
    clock.tick()
with open(f"{out}_{letter}", "w") as file:
    json.dump(clock.running.seconds, file)
"""


def test_arms_advance_together_and_clocks_run_in_turns_only(bench: ModuleType, tmp_path: Path) -> None:
    order = tmp_path / "order"

    def start(letter: str, passes: int, seconds: float) -> Any:
        command = [sys.executable, "-c", SLEEPER, FOLDER, letter, passes, seconds, order]
        return bench.Arm([str(part) for part in command], 1, passes)

    bench.take_turns({"a": start("a", 6, 0.02), "b": start("b", 3, 0.01)}, 0.0)
    assert order.read_text() in ("abaabaaba", "abaabaaab", "abaababaa")
    # with the other arm's turns in it, a clock would show 0.03 and more for most passes
    assert np.median(json.loads((tmp_path / "order_a").read_text())) < 0.03
    assert np.median(json.loads((tmp_path / "order_b").read_text())) < 0.02


def test_an_error_in_an_arm_ends_the_benchmark(bench: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    waits = bench.Arm([sys.executable, "-c", "print(0, 0, flush=True); input()"], 1, 1)
    broken = bench.Arm(
        [sys.executable, "-c", "print(0, 0, flush=True); input(); raise ValueError('broken')"], 1, 1
    )
    with pytest.raises(RuntimeError, match="exit code 1"):
        bench.take_turns({"a": broken, "b": waits}, 1.0)
    assert "ValueError: broken" in capfd.readouterr().err
    assert waits._process.returncode is not None


def test_seconds_follow_how_many_concepts_shared_a_pass(bench: ModuleType) -> None:
    from inversion_report import estimate_seconds

    block = bench.BLOCK
    # two concepts for two blocks at 2 s a pass, then one for a block at 1 s; 7 s before; one disturbed pass
    shared, alone, before = [2.0] * (2 * block - 1), [1.0] * block, [7.0]
    disturbed = [*shared[:4], 1000.0, *shared[5:]]
    units = [
        bench.Unit("d", seed, ["x", "y"], steps=[2 * block, 3 * block], seconds=before + passes + alone)
        for seed, passes in enumerate((disturbed, shared))
    ]
    blocks = bench.group_blocks(units)
    assert {active: len(values) for active, values in blocks.items()} == {2: 4, 1: 2}
    assert estimate_seconds(units, blocks)[0] == pytest.approx(2 * (7 + sum(shared) + sum(alone)))


def test_who_waits_takes_the_place_of_who_has_stopped(bench: ModuleType) -> None:
    unit = bench.Unit("d", 0, list("abcdefghij"), steps=[5, 3, *[9] * 6, 4, 2])
    assert [unit.active(number) for number in (0, 2, 3, 4, 5, 6, 7, 8, 9)] == [8, 8, 8, 8, 8, 8, 6, 6, 0]


def compare_made_up(bench: ModuleType, likeness_c: float, seconds_c: float) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    steps = {"a": 400, "b": 200, "c": 100, "d": 100}
    seconds = {"a": 2.0, "b": 1.0, "c": seconds_c, "d": 2 * seconds_c}
    arms = {
        letter: [
            bench.Unit(
                letter, 0, names, [steps[letter]] * len(names), ["why"] * len(names),
                list(seconds[letter] * (1 + 0.01 * rng.random(steps[letter]))),
            )
            for names in ([["x", "y"]] if letter == "d" else [["x"], ["y"]])
        ]
        for letter in "abcd"
    }  # fmt: skip
    flops = {letter: {"once": 0.0, "step": 1e9} for letter in "abcd"}
    values = {letter: 0.6 + 0.05 * rng.standard_normal(64) for letter in "0ab"}
    for letter, likeness in (("c", likeness_c), ("d", 0.6)):
        values[letter] = values["a"] + likeness - 0.6 + 0.01 * rng.standard_normal(64)
    measured = {letter: {"likeness": list(v), "obedience": list(v)} for letter, v in values.items()}
    report = bench.compare(arms, flops, measured) | {"notes": []}
    assert "(c) ours" in bench.table_arms(report)
    assert report["arms"]["c"]["flops_ratio"] == pytest.approx(4.0)
    (ends,) = [verdict["over_concepts"] for verdict in report["verdicts"] if "over_concepts" in verdict]
    assert ends == pytest.approx([2 / seconds_c] * 2, rel=0.02)
    return [verdict["holds"] for verdict in report["verdicts"]]


def test_verdicts_can_say_yes_and_no(bench: ModuleType) -> None:
    # likeness of (c), of (d), (c) 15 times (a), (c) twice (b), (d) twice (c): d takes 2 s for two, as c does
    assert compare_made_up(bench, 0.60, 0.4) == [True, True, True, True, False]
    assert compare_made_up(bench, 0.57, 0.4)[0] is False
    assert compare_made_up(bench, 0.60, 0.6)[2:4] == [False, True]
    assert compare_made_up(bench, 0.60, 1.2)[2:4] == [False, False]


@pytest.mark.slow
def test_the_benchmark_runs_and_continues(
    bench: ModuleType, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--model", str(tiny_model), "--concepts", "harp.n.01", "--set", "init=a"]
    arguments += ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "found.json"), "--slice", "0"]
    arguments += ["--arms", "abecd"]
    bench.main(arguments)
    first = json.loads((tmp_path / "found.json").read_text())
    assert set(first["arms"]) == set("0abcde")
    assert "(d) at least 2 times the concepts a minute of (c): **" in capsys.readouterr().out
    (tmp_path / "work" / "b" / "seed_0" / "harp.n.01.json").unlink()  # as if it had been killed there
    bench.main(arguments)
    again = json.loads((tmp_path / "found.json").read_text())
    for letter in "0aecd":
        assert again["arms"][letter] | first["arms"][letter] == first["arms"][letter] | again["arms"][letter]
    assert again["arms"]["b"]["likeness"] == first["arms"]["b"]["likeness"]
    with pytest.raises(bench.UserError, match="another model or other settings"):
        bench.main([*arguments, "--set", "batch=3"])


@pytest.mark.slow
def test_throughput_runs_on_any_model(
    bench: ModuleType, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    steps = str(2 * bench.BLOCK)
    bench.main(
        ["--throughput", "--model", str(tiny_model), "--steps", steps, "--json", str(out), "--slice", "0"]
    )
    found = json.loads(out.read_text())
    assert set(found) == set("abcd")
    assert all(row["seconds_a_step"] > 0 for row in found.values())
    assert "(d) ours" in capsys.readouterr().out

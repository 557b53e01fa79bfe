"""`llm plan` and the planner on toys: what is printed, kept, chosen, and carried out within its budget."""

import json
from pathlib import Path
from typing import Any

import pytest
from language_toys import make_toy, save_toy
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.errors import UserError
from t2iprobe.llm import planning
from t2iprobe.llm.memory.placement import Shares
from t2iprobe.llm.models import cache_folder
from t2iprobe.llm.planning import find_budgets, plan_placement


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("target") / "toy", make_toy(layers=6).float())


def plan(target: Path, *words: str) -> Any:
    result = CliRunner().invoke(
        app, ["llm", "plan", "--model", str(target), "--draft", "none", "--device", "cpu", *words]
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_plan_has_a_placement(target: Path) -> None:
    words = ("--memory", "400kB", "--prompt-tokens", "24", "--new-tokens", "8")
    found = json.loads(plan(target, *words, "--json"))
    placement = found["placement"]
    for name in ("weights", "cache", "hidden"):
        shares = placement[name]
        assert sum(shares.values()) == pytest.approx(1)
        assert placement["realised"][name] == pytest.approx(shares)  # nothing was left to round
        assert shares["ram"] == 0
    assert placement["block"] == placement["batch"] * placement["batches"] >= 1
    assert (placement["weight_bits"], placement["cache_bits"], placement["cpu_attention"]) == (
        None,
        None,
        False,
    )
    assert found["predicted_tokens_per_second"] > 0
    assert found["predicted_peak_bytes"]["device"] <= 400_000
    assert found["binding"] in found["saved_by_a_tenth_more"]
    assert [more["memory"] for more in found["more_memory"]] == [440_000, 800_000]
    assert all(
        more["predicted_tokens_per_second"] >= found["predicted_tokens_per_second"]
        for more in found["more_memory"]
    )
    assert found["choice"] in found["table"]  # the trees' plan is there, too
    text = plan(target, *words)
    assert f"blocks of {placement['batches']} × {placement['batch']} prompts" in text
    assert f"what limits it: {found['binding']}" in text
    assert "2 times the memory (1 MB): " in text
    asked = " / ".join(f"{placement['weights'][tier]:.1%}" for tier in ("device", "ram", "disk"))
    assert f"   {asked}\n" in text
    assert f"{found['binding']}, a tenth more: " in text
    assert "tokens a pass" in text


def test_the_machine_is_measured_once(target: Path) -> None:
    plan_placement(str(target), memory=400_000)
    (kept,) = cache_folder("hardware").glob("*.json")
    before = kept.read_text()
    plan_placement(str(target), memory=300_000)
    assert kept.read_text() == before
    kept.write_text("{")
    plan_placement(str(target), memory=300_000)
    measured = json.loads(kept.read_text())
    measured["layer_seconds"] = {"1": 100.0}
    kept.write_text(json.dumps(measured))
    slow = plan_placement(str(target), memory=300_000)
    assert slow["predicted_tokens_per_second"] < 10
    again = plan_placement(str(target), memory=300_000, measure=True)
    assert again["predicted_tokens_per_second"] > 100 * slow["predicted_tokens_per_second"]


def test_what_is_given_is_kept(target: Path) -> None:
    found = plan_placement(str(target), memory=900_000, block=3, batch=2, prompts=100, new_tokens=4)
    assert (found["placement"]["batches"], found["placement"]["batch"]) == (3, 2)
    slow = plan_placement(str(target), memory=300_000, link=10_000)
    assert slow["binding"] in ("disk link", "device memory")
    packed = plan_placement(str(target), memory=300_000, link=10_000, bits=4)
    assert packed["placement"]["weight_bits"] == 4
    assert packed["predicted_tokens_per_second"] > slow["predicted_tokens_per_second"]


def test_without_a_budget_everything_stays(target: Path) -> None:
    found = plan_placement(str(target), prompts=40)
    assert found["placement"]["weights"]["device"] == found["placement"]["cache"]["device"] == 1
    assert found["more_memory"][0]["memory"] is None


def test_on_a_cpu_ram_is_the_device(tmp_path: Path) -> None:
    budgets = find_budgets(10**6, "cpu", tmp_path / "not" / "there")
    assert (budgets["device"], budgets["ram"]) == (10**6, 0)
    assert budgets["disk"] is not None
    assert budgets["disk"] > 0
    free = find_budgets(None, "cpu", tmp_path)["device"]
    assert free is not None
    assert free > 10**8


def test_what_cannot_be_is_told_in_a_line(target: Path) -> None:
    for arguments, match in (
        ({"memory": 1000}, "too small for a batch: give"),
        ({"prompt_tokens": 0}, "prompt tokens: give 1 or more"),
        ({"batch": 0}, "batch: give 1 or more"),
        ({"prompts": -1}, "prompts: give 1 or more"),
    ):
        with pytest.raises(UserError, match=match):
            plan_placement(str(target), **arguments)  # type: ignore[arg-type]
    result = CliRunner().invoke(app, ["llm", "plan", "--model", str(target), "--bits", "3"])
    assert result.exit_code != 0
    assert isinstance(result.exception, UserError)


def test_what_is_chosen_runs_within_its_budget(target: Path, tmp_path: Path) -> None:
    """The runtime's own account of a chosen block: no more than the budget, nor than was predicted."""
    from t2iprobe.llm.throughput import Block, write_file

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": "a heron at dusk"[: 4 + n % 9]}) for n in range(23)))
    for number, (memory, block) in enumerate(
        [
            (150_000, Block()),
            (250_000, Block(batches=4)),
            (250_000, Block(bits=4)),
            (2_000_000, Block(batch=3)),
        ]
    ):
        made = write_file(
            prompts, tmp_path / f"{number}.jsonl", model=str(target), block=block, memory=memory,
            max_new_tokens=6, disk=tmp_path,
        )  # fmt: skip
        assert made["peak_bytes"]["device"] <= memory
        for name, asked in made["placement"]["asked"].items():
            assert made["placement"]["realised"][name] == pytest.approx(asked)
        assert made["placement"]["batches"] == (block.batches or made["placement"]["batches"])
        assert made["predicted_tokens_per_second"] > 0
        assert len((tmp_path / f"{number}.jsonl").read_text().splitlines()) == 23
    assert Shares(**made["placement"]["asked"]["weights"]) == Shares(1, 0, 0)
    assert planning.cache_folder("hardware").exists()

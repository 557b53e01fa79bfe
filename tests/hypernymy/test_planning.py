"""What a plan says of one process, of a share, of many; runs and sweeps test the measuring itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2iprobe.config import Study, load_study
from t2iprobe.hypernymy import planning
from t2iprobe.hypernymy.prediction import Place
from t2iprobe.hypernymy.study import run_study


def make_study(model: Path, **more: Any) -> Study:
    settings: dict[str, Any] = {"synsets": "dog.n.01,bird.n.01,cat.n.01", "samples": 3, "steps": 1}
    return load_study(None, {"model": str(model), **settings, "batch_size": 2, **more})


def place(pictures: float, **more: Any) -> Place:
    found = {"batch_size": 2, "lanes": 1, "step_seconds": 0.5, "logits": {}} | more
    return Place({"start": 1.0, "prompts": 0.25, "pictures": pictures}, **found)


def test_the_slowest_place_and_the_report_make_the_time(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.RunPlan, "time_report", lambda *_: 2.0)
    plan = planning._describe_run(make_study(tiny_model), None, None)

    found = planning._conclude(plan, [place(8.0, batch_size=4), place(16.0, batch_size=3)], {})

    assert found["predicted_seconds"] == 1.0 + 0.25 + 16.0 + 2.0
    assert found["seconds"] == {"start": 1.0, "prompts": 0.25, "pictures": 16.0, "report": 2.0}
    assert (found["places"], found["batch_size"], found["step_seconds"]) == (2, 3, 0.5)
    assert planning.describe_cost(found) == "time left by 2 together: 0 min 19 s (3 pictures at once)"
    assert "places" not in plan.found
    alone = planning._conclude(plan, [place(8.0)], {})
    assert planning.describe_cost(alone).startswith("time left here: 0 min 11 s")


def test_shares_are_those_of_the_run(tiny_model: Path, tmp_path: Path) -> None:
    study = make_study(tiny_model)
    run_study(study, tmp_path / "run", share=(0, 2))

    plan = planning._describe_run(study, tmp_path / "run", None)

    assert plan.missing == [1, 3, 5, 7]
    assert plan.take((0, 2)).left == 0
    assert plan.take((1, 2)).missing == plan.missing
    assert plan.take((2, 3)).missing == [5]
    assert plan.thin(2).missing == [1, 5]  # whatever is missing, a worker's part of it
    # A share that has nothing left is told without measuring anything.
    told = planning.plan_study(study, tmp_path / "run", share=(0, 2))
    assert (told["stored"], told["predicted_seconds"]) == (5, None)
    assert planning.describe_cost(told) == "time left: none"


def test_a_launch_whose_first_process_is_done_plans_for_the_others(tiny_model: Path, tmp_path: Path) -> None:
    study = make_study(tiny_model)
    run_study(study, tmp_path / "run", share=(0, 2))

    class Other:
        index, count, first = 0, 2, True

        def gather(self, found: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
            return [found, [vars(place(16.0))]]

    told = planning.plan_study(study, tmp_path / "run", launch=Other())

    assert (told["stored"], told["places"]) == (5, 1)
    assert told["seconds"]["pictures"] == 16.0
    assert told["seconds"]["report"] > 0


def test_a_share_takes_its_part_of_the_time(tiny_model: Path, tmp_path: Path) -> None:
    study = make_study(tiny_model, samples=16, steps=60)
    whole, half = (planning.plan_study(study, None, share=share) for share in ((0, 1), (1, 4)))

    assert half["pictures"] == whole["pictures"] == 48
    assert half["seconds"]["pictures"] < 0.6 * whole["seconds"]["pictures"]


def test_shares_of_a_sweep_are_those_of_its_cells(tiny_model: Path, tmp_path: Path) -> None:
    axes = {"steps": [1, 2]}
    plan = planning._describe_sweep(make_study(tiny_model), axes, tmp_path / "none", None)
    later = planning.replace(plan, missing=[range(9), range(4, 9)])

    for share in ((0, 2), (1, 2), (2, 4)):
        index, count = share
        wanted = [[p for p in each if p % count == index] for each in later.missing]
        assert [list(each) for each in later.take(share).missing] == wanted
    assert [list(each) for each in later.thin(4).missing] == [[0, 4, 8], [4, 8]]
    assert later.left == 14


def test_pages_are_timed_from_logits_alone(tiny_model: Path, tmp_path: Path) -> None:
    logits = {"embedded": np.random.default_rng(0).standard_normal((4, 1000)).astype(np.float32)}
    run = planning._describe_run(make_study(tiny_model), None, None)
    sweep = planning._describe_sweep(make_study(tiny_model), {"steps": [1, 2]}, None, None)

    assert run.time_report(logits) > 0
    assert sweep.time_report(logits) > run.time_report(logits) / 2

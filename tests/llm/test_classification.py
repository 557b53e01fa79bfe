"""Scores of labels by hand, demonstrations, ensembles, and a whole study on a toy: continued, refused."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_toys import make_toy, save_toy
from page_checks import check_page
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.errors import UserError
from t2iprobe.llm.classification import (
    METHODS,
    average_probabilities,
    calibrate,
    choose_demonstrations,
    losses_to_probabilities,
    write_requests,
)
from t2iprobe.llm.commands import load_engine
from t2iprobe.llm.labelled_data import Labelled, load_labelled
from t2iprobe.llm.template_study import TemplateStudy, classify, run_study
from t2iprobe.llm.template_tables import read_runs
from t2iprobe.llm.templates import Template

DATA = Labelled(
    "toys",
    "topic",
    ("aa", "b"),
    (("dog dog cat", "aa"), ("ship sea boat", "b"), ("cat cat cow", "aa"), ("sea wave ship", "b")),
    (("dog cat", "aa"), ("ship sea", "b"), ("cow", "aa")),
)
TEMPLATE = Template("text: {}", "is {}.", " ", "\n")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("target") / "toy")


@pytest.fixture(scope="module")
def engine(target: Path) -> Any:
    with load_engine(str(target), "none", dtype="float64") as engine:
        yield engine


def mean_loss(model: Any, ids: list[int], begin: int, end: int) -> float:
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -float(np.mean([float(logits[place - 1, ids[place]]) for place in range(begin, end)]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shots", [0, 2])
def test_probabilities_are_those_of_plain_forwards(engine: Any, method: str, shots: int) -> None:
    model, tokenizer = make_toy(), engine.tokenizer
    found = classify(engine, DATA, TEMPLATE, METHODS[method], "random", shots, seed=3)
    demonstrations = choose_demonstrations(DATA, ["x"], "random", shots, 3)[0]

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def score(text: str) -> list[float]:
        losses = []
        for label in DATA.labels:
            written = [(f"is {b}.", "text: " + a) for a, b in [*demonstrations, (text, label)]]
            if method != "channel":
                written = [(b, a) for a, b in written]
            context = "".join(f"{a} {b}\n" for a, b in written[:-1])
            head = [0, *encode(context), *encode(written[-1][0]), *encode(" ")]
            ids = [*head, *encode(written[-1][1]), 1]
            begin, end = (1, len(ids)) if method == "direct" else (len(head), len(ids) - 1)
            losses.append(mean_loss(model, ids, begin, end))
        return losses

    wanted = losses_to_probabilities([score(text) for text, _ in DATA.test])
    if method == "calibrate":
        free = losses_to_probabilities([score(text) for text in ("N/A", "", "[MASK]")]).mean(axis=0)
        wanted = wanted / free
        wanted /= wanted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_probabilities_by_hand() -> None:
    np.testing.assert_allclose(losses_to_probabilities([[0, np.log(3)]]), [[0.75, 0.25]])
    # A label that is likely anyway counts for less: 0.6 / 0.8 against 0.4 / 0.2.
    np.testing.assert_allclose(
        calibrate(np.array([[0.6, 0.4]]), np.array([[0.9, 0.1], [0.7, 0.3]])), [[0.75 / 2.75, 2 / 2.75]]
    )


def test_an_ensemble_is_the_mean_and_twice_softened_votes_are_flatter() -> None:
    votes = [[[0.9, 0.1]], [[0.45, 0.55]], [[0.45, 0.55]]]
    np.testing.assert_allclose(average_probabilities(votes), [[0.6, 0.4]])
    twice = average_probabilities(votes, twice=True)
    by_hand = np.mean([np.exp(v) / np.exp(v).sum() for v in np.array(votes)[:, 0]], axis=0)
    np.testing.assert_allclose(twice, [by_hand])
    assert 0.5 < twice[0, 0] < 0.6


def test_demonstrations_are_chosen_as_asked() -> None:
    texts = [text for text, _ in DATA.test]
    nearest = choose_demonstrations(DATA, texts, "nearest", 1, 0)
    assert [shown[0][0] for shown in nearest] == ["dog dog cat", "ship sea boat", "cat cat cow"]
    labels = {
        choose_demonstrations(DATA, texts, "nearest", 1, seed)[0][0][1] for seed in range(20)
    }  # drawn, not the text's own
    assert labels == {"aa", "b"}
    typical = choose_demonstrations(DATA, texts, "topic", 2, 0)
    assert {label for _, label in typical[0]} == {"aa", "b"}
    assert typical[0] == typical[2]
    drawn = choose_demonstrations(DATA, texts, "random", 3, 5)
    assert drawn[0] == drawn[1]
    assert len({text for text, _ in drawn[0]}) == 3
    assert choose_demonstrations(DATA, texts, "topic", 0, 0) == [[], [], []]
    with pytest.raises(UserError, match="fewer than 5"):
        choose_demonstrations(DATA, texts, "random", 5, 0)
    with pytest.raises(UserError, match="no selection"):
        choose_demonstrations(DATA, texts, "knn", 1, 0)


def test_labels_that_tokenise_alike_are_refused(engine: Any) -> None:
    # "A" and "B" are no letters that the toy knows.
    with pytest.raises(UserError, match="'A' and 'B' become the same tokens"):
        write_requests(engine.tokenizer, TEMPLATE, METHODS["direct"], ["a"], ["A", "B"], [[]])


def test_a_csv_is_read_and_bad_ones_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text("text,label,split\na b,x,train\nc,y,test\nd,x,test\n")
    data = load_labelled(str(file))
    assert (data.labels, data.train, data.test) == (("x", "y"), (("a b", "x"),), (("c", "y"), ("d", "x")))
    file.write_text("text,label\n" + "".join(f"text {n},{'xy'[n % 2]}\n" for n in range(10)))
    data = load_labelled(str(file))
    assert len(data.train) == len(data.test) == 5
    assert data.limit(2).test == data.test[:2]
    for content, match in (
        ("text,kind\na,b\n", "lacks the column label"),
        ("text,label\na,x\n ,y\n", "row 3: text or label is empty"),
        ("text,label\na,x\nb,x\n", "nothing to tell apart"),
        ("text,label,split\na,x,dev\n", "train or test"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=match):
            load_labelled(str(file))
    with pytest.raises(UserError, match="did you mean vader"):
        load_labelled("vadr")


def test_glosses_have_their_classes() -> None:
    data = load_labelled("wordnet")
    assert len(data.labels) == 25
    assert "Animal" in data.labels
    assert "Tops" not in data.labels
    assert not set(data.train) & set(data.test)


def write_data(tmp_path: Path) -> Path:
    file = tmp_path / "own.csv"
    rows = [(f"{word} {n}", label) for n in range(6) for word, label in (("dog", "aa"), ("sea", "b"))]
    file.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return file


def test_a_study_is_written_continued_and_kept_apart(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = write_data(tmp_path), tmp_path / "out"
    words = ["llm", "templates", "--data", str(data), "--model", str(target), "--count", "4"]
    words += ["--method", "direct,channel,calibrate", "--shots", "0,2", "--ensemble", "3", "--device", "cpu"]
    words += ["--seed", "13", "--out", str(out)]
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((out / "results.json").read_text())
    assert len(found["runs"]) == 6
    for run, grown in zip(found["runs"], found["ensembles"], strict=True):
        single = grown["sizes"][0]
        assert single["mean"] == pytest.approx(np.mean(run["scores"]))
        assert single["first"] == run["scores"][0]
        assert [size["subsets"] for size in grown["sizes"]] == [4, 6, 4]
        assert single["gain"]["value"] == 0
        for size in grown["sizes"]:
            assert size["gain"]["value"] == pytest.approx(size["mean"] - single["mean"])
    check_page((out / "report.html").read_text())
    rows = read_runs(out / "runs.csv")
    assert [row["prediction_method"] for row in rows[:3]] == [
        "direct_False",
        "channel_True",
        "calibrate_True",
    ]
    assert [row["scores"] for row in rows] == [run["scores"] for run in found["runs"]]
    with open(out / "runs.csv", newline="") as file:
        assert next(csv.reader(file))[-1] == "scores"

    # A part that is lost is made again, and no other.
    lost = out / "parts" / "0-channel-2-1.npz"
    times = {path: path.stat().st_mtime_ns for path in lost.parent.glob("*.npz")}
    lost.unlink()
    again = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert json.loads(again.stdout) == found
    changed = {path for path in times if path.stat().st_mtime_ns != times[path]}
    assert changed == {lost}

    with pytest.raises(UserError, match="holds another study \\(count differs"):
        CliRunner().invoke(app, [*words, "--count", "5"], catch_exceptions=False)
    lost.write_bytes(lost.read_bytes()[:-9])
    with pytest.raises(UserError, match="is corrupt"):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_what_a_later_cell_would_refuse_is_refused_at_once(target: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "own.csv", tmp_path / "out"
    words = ["llm", "templates", "--data", str(file), "--model", str(target), "--out", str(out)]
    rows = "".join(f"text {n},{'AB'[n % 2]}\n" for n in range(8))
    file.write_text(f"text,label\n{rows}", encoding="utf-8-sig")  # as spreadsheets write it
    for more, match in (
        ([], "'A' and 'B' become the same tokens"),
        (["--shots", "0,9"], "fewer than 9"),
        (["--shots", "2", "--selection", "randon"], "did you mean random"),
        (["--method", "direct,chanel"], "did you mean channel"),
    ):
        with pytest.raises(UserError, match=match):
            CliRunner().invoke(app, [*words, *more], catch_exceptions=False)
        assert not out.exists()


def test_the_dry_run_writes_nothing(target: Path, tmp_path: Path) -> None:
    words = ["llm", "templates", "--data", str(write_data(tmp_path)), "--model", str(target)]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--dry-run", "--json"])
    plan = json.loads(result.stdout)
    assert (plan["texts"], plan["classifications"]) == (6, 10)
    assert plan["rows"] > 6 * 10
    assert not (tmp_path / "out").exists()


def test_a_study_of_two_models_tells_how_ranks_agree(target: Path, tmp_path: Path) -> None:
    other = save_toy(tmp_path / "other", make_toy(seed=5))
    study = TemplateStudy((str(target), str(other)), ("direct",), (0,), count=6, ensemble=2)
    data = load_labelled(str(write_data(tmp_path)))
    found = run_study(study, data, tmp_path / "out")
    assert found["ranks"][0]["templates_between_models"]["pairs"] <= 1
    assert len(found["runs"]) == 2


def test_what_cannot_be_compared_is_refused() -> None:
    for arguments, match in (
        ({"methods": ("director",)}, "no method 'director'"),
        ({"shots": (-1,)}, "0 demonstrations or more"),
        ({"ensemble": 11}, "1 to 10 templates"),
        ({"limit": 0}, "1 text or more"),
    ):
        with pytest.raises(UserError, match=match):
            TemplateStudy(**arguments)  # type: ignore[arg-type]

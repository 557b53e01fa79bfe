"""Answers of people: shares and Krippendorff's alpha, against a published example and brute force."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.human import analyse_answers, describe_answers, krippendorff_alpha, read_answers

# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), part C: four observers, twelve units.
PUBLISHED = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""


def test_alpha_is_the_published_one():
    table = [line.split() for line in PUBLISHED.strip().splitlines()]
    counts = np.array(
        [[sum(row[unit] == str(value) for row in table) for value in range(1, 6)] for unit in range(12)]
    )
    assert krippendorff_alpha(counts) == pytest.approx(0.743, abs=5e-4)


def brute_alpha(counts):
    """1 − observed / expected disagreement, over all pairs of answers, as defined."""
    answers = [[value for value, n in enumerate(row) for _ in range(n)] for row in counts]
    answers = [unit for unit in answers if len(unit) > 1]
    pool = [value for unit in answers for value in unit]
    observed = sum(
        sum(x != y for i, x in enumerate(unit) for j, y in enumerate(unit) if i != j) / (len(unit) - 1)
        for unit in answers
    ) / len(pool)
    expected = sum(x != y for i, x in enumerate(pool) for j, y in enumerate(pool) if i != j)
    return 1 - observed / (expected / (len(pool) * (len(pool) - 1)))


def test_alpha_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.integers(0, 4, (12, 3))
        assert krippendorff_alpha(counts) == pytest.approx(brute_alpha(counts))
    assert np.isnan(krippendorff_alpha(np.array([[3, 0, 0], [2, 0, 0]])))
    assert np.isnan(krippendorff_alpha(np.array([[1, 0, 0], [0, 1, 0]])))


ROWS = [
    ("t1", "w1", "a", 0),
    ("t1", "w2", "b", 1),
    ("t2", "w1", "none", 1),
    ("t2", "w2", "b", 0),
    ("t3", "w3", "a", 1),
]


def write(path, rows=ROWS, names=("task", "worker", "answer", "swapped"), delimiter=","):
    path.write_text("\n".join(delimiter.join(map(str, row)) for row in (names, *rows)) + "\n")
    return path


def test_swapped_pairs_are_turned_back(tmp_path):
    counts, workers = read_answers(write(tmp_path / "a.csv"))
    assert workers == 3
    # A wins t1 twice, t2 has one none and one B, and in t3 the a of a swapped pair means B
    assert counts.tolist() == [[2, 0, 0], [0, 1, 1], [0, 1, 0]]
    published = ("ASSIGNMENT:task_id", "ASSIGNMENT:worker_id", "OUTPUT:result", "INPUT:label")
    again, _ = read_answers(write(tmp_path / "a.tsv", names=published, delimiter="\t"))
    assert again.tolist() == counts.tolist()
    found = analyse_answers(tmp_path / "a.csv")
    assert found["answers"] == {"a": 2, "b": 2, "none": 1}
    assert found["prefer_a"]["value"] == 0.5
    assert found["equal"]["value"] == 0.2
    plain, _ = read_answers(
        write(tmp_path / "b.csv", [row[:3] for row in ROWS], ("task", "worker", "answer"))
    )
    assert plain.tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        ([], ("task", "worker", "answer"), "holds no answers"),
        ([("t", "w", "a")], ("task", "who", "answer"), "no column worker: it has task, who, answer"),
        ([("t", "w", "c")], ("task", "worker", "answer"), "line 2 of .*the answer 'c' is none of a, b, none"),
        ([("t", "w", "a"), ("t", "w", "b")], ("task", "worker", "answer"), "line 3 .*answers task t twice"),
        ([("t", "w", "a", 2)], ("task", "worker", "answer", "swapped"), "swapped is '2', not 0 or 1"),
    ],
)
def test_bad_answers_are_told(tmp_path, rows, names, message):
    with pytest.raises(UserError, match=message):
        read_answers(write(tmp_path / "a.csv", rows, names))
    with pytest.raises(UserError, match="cannot read"):
        read_answers(tmp_path / "none.csv")


def test_intervals_over_tasks_cover_as_often_as_promised():
    """Answers to one task depend on each other: an interval over answers would be too narrow."""
    rng, hits, repeats = np.random.default_rng(1), 0, 120
    for repeat in range(repeats):
        chance = rng.beta(0.6, 0.4, 80)  # mean .6
        votes = rng.binomial(5, chance)
        counts = np.stack([votes, 5 - votes, np.zeros_like(votes)], axis=1)
        low, high = describe_answers(counts, seed=repeat, resamples=100)["prefer_a"]["interval"]
        hits += low <= 0.6 <= high
    assert 0.88 <= hits / repeats <= 0.99


def test_what_cannot_be_told_is_none():
    found = describe_answers(np.array([[3, 0, 0], [2, 0, 0]]), resamples=50)
    assert found["alpha"] == {"value": None, "interval": None}
    assert found["prefer_a"] == {"value": 1.0, "interval": [1.0, 1.0]}
    nothing = describe_answers(np.array([[0, 0, 2]]), resamples=50)
    assert nothing["prefer_a"]["value"] is None


def test_the_command(tmp_path):
    path = write(tmp_path / "a.csv")
    shown = CliRunner().invoke(app, ["hypernymy", "human", str(path), str(path)], catch_exceptions=False)
    assert shown.stdout.count("3 tasks, 3 workers, 5 answers") == 2
    assert "A preferred (without none)  50.00 %" in shown.stdout
    printed = CliRunner().invoke(app, ["hypernymy", "human", str(path), "--json"], catch_exceptions=False)
    assert json.loads(printed.stdout)[0]["equal"]["value"] == 0.2

"""Each scorer of the hallucination suite against a truth table by hand."""

from typing import Any

import numpy as np
import pytest

from t2iprobe.llm.suite_scores import (
    is_exact,
    measure_rouge,
    measure_self_consistency,
    normalise_answer,
    score_judgement,
    score_support,
)
from t2iprobe.llm.suites import SUITES, aggregate, read_metric, score_interval


@pytest.mark.parametrize(
    ("answer", "hallucinated", "wanted"),
    [
        ("Yes", True, {"acc": 1, "correctness": 1, "em": 1}),
        ("Yes.", False, {"acc": 0, "correctness": 1, "em": 0}),
        (" no, it does not", False, {"acc": 1, "correctness": 1, "em": 1}),
        ("NO", True, {"acc": 0, "correctness": 1, "em": 0}),
        ("Yes and no", True, {"acc": 0, "correctness": 0}),
        ("I cannot say", True, {"acc": 0, "correctness": 0}),
        ("", False, {"acc": 0, "correctness": 0}),
        ("nothing", False, {"acc": 0, "correctness": 0}),  # a word that begins with no
    ],
)
def test_judgements(answer: str, hallucinated: bool, wanted: dict[str, float]) -> None:
    assert score_judgement(answer, hallucinated) == wanted


@pytest.mark.parametrize(
    ("answer", "aliases", "right"),
    [
        (" The Beatles!", ["beatles"], True),
        ("A  red-fox", ["redfox"], True),
        ("beatles band", ["beatles"], False),
        ("", [""], False),
        ("the", ["a"], False),
        ("1969", ["1968", "1969"], True),
    ],
)
def test_exact_answers(answer: str, aliases: list[str], right: bool) -> None:
    assert is_exact(answer, aliases) == right


def test_answers_are_normalised_as_published() -> None:
    assert normalise_answer(" The Cat, and  a Hat. ") == "cat and hat"


@pytest.mark.parametrize(
    ("summary", "reference", "wanted"),
    [
        ("The dog ran home.", "the dog ran home", 1.0),
        ("a cat ran", "a cat sat", 2 / 3),  # two of three words in order, on both sides
        ("dogs", "dog", 1.0),  # stemmed
        ("home ran", "ran home", 0.5),  # in order: one of two
        ("rain", "rain fell on the roof all night", 2 / 8),  # all of one word, one of seven
        ("snow", "rain fell", 0.0),
        ("", "rain fell", 0.0),
    ],
)
def test_summaries(summary: str, reference: str, wanted: float) -> None:
    pytest.importorskip("rouge_score", reason="lm-evaluation-harness is not installed")
    assert measure_rouge(summary, reference) == pytest.approx(wanted)


def test_self_consistency_by_hand() -> None:
    answer = "Grey heron wades slowly. Purple elephants sing."
    # The first sentence: grey 2/2, heron 2/2, wades 1/2, slowly 0/2; the second: elephants 1/2 of three.
    samples = ["A grey heron wades here.", "The grey heron eats elephants."]
    assert measure_self_consistency(answer, samples) == {"consistency": pytest.approx(1 / 6), "empty": 0.0}
    assert measure_self_consistency("Grey heron wades slowly.", samples)["consistency"] == 0.625
    same = measure_self_consistency("Grey heron wades.", ["grey heron wades"] * 5)
    assert same == {"consistency": 1.0, "empty": 0.0}


@pytest.mark.parametrize("answer", ["", "  \n", "It is.", "the and of", "A heron."])
def test_empty_answers_do_not_win(answer: str) -> None:
    assert measure_self_consistency(answer, [answer] * 5) == {"consistency": 0.0, "empty": 1.0}


def test_empty_samples_bear_nothing_out() -> None:
    assert measure_self_consistency("Grey heron wades.", ["", "", ""])["consistency"] == 0.0
    assert measure_self_consistency("Grey heron wades.", [])["empty"] == 1.0


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("A brown dog sleeps on the grass.", {"supported": 1, "named": 1, "empty": 0}),
        ("A brown dog plays a shiny piano.", {"supported": 0, "named": 1, "empty": 0}),
        ("A brown animal sleeps on the grass.", {"supported": 0, "named": 0, "empty": 0}),
        ("A dog.", {"supported": 0, "named": 1, "empty": 1}),
        ("", {"supported": 0, "named": 0, "empty": 1}),
    ],
)
def test_support(caption: str, wanted: dict[str, float]) -> None:
    assert score_support(caption, "dog.n.01") == wanted


def test_means_of_classes_by_hand() -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "factuality", "value": 0.2, "stderr": 0.03},
        {"kind": "factuality", "value": 0.6, "stderr": 0.04},
        {"kind": "faithfulness", "value": 0.5, "stderr": None},
    ]
    found = aggregate(lines)
    assert found["factuality"] == {
        "value": pytest.approx(0.4),
        "stderr": pytest.approx(0.025),
        "interval": pytest.approx([0.351, 0.449]),
        "tasks": 2,
    }
    assert found["faithfulness"] == {"value": 0.5, "stderr": None, "interval": None, "tasks": 1}
    assert aggregate(lines[:2])["faithfulness"] is None


def test_intervals_are_those_with_a_document_of_each_kind_more() -> None:
    for scores in ([0.0] * 8, [1.0] * 5, [0.0, 1.0, 1.0, 0.0, 1.0], [0.2, 0.4, 0.9]):
        stderr = float(np.std(scores, ddof=1) / np.sqrt(len(scores)))
        more = [*scores, 0.0, 1.0]
        half = 1.96 * np.std(more, ddof=1) / np.sqrt(len(more))
        low, high = np.clip([np.mean(more) - half, np.mean(more) + half], 0, 1)
        mean = float(np.mean(scores))
        found = score_interval(mean, stderr, len(scores))
        assert found == pytest.approx([min(low, mean), max(high, mean)])
    assert score_interval(0.5, None, 8) is None


def test_a_class_that_is_never_right_is_not_certain() -> None:
    never = [{"kind": "factuality", "value": 0.0, "stderr": 0.0, "documents": 8}] * 4
    one, four = (aggregate(never[:tasks])["factuality"] for tasks in (1, 4))
    assert one is not None
    assert four is not None
    assert one["interval"] == score_interval(0.0, 0.0, 8)
    assert 0 == four["interval"][0] < four["interval"][1] < one["interval"][1]


def test_metrics_are_read_whatever_their_filter() -> None:
    metrics = {
        "alias": "x",
        "exact,none": 40.0,
        "exact_stderr,none": 2.0,
        "acc,strict": 0.3,
        "f1,none": "N/A",
    }
    assert read_metric(metrics, "exact", 100.0) == (0.4, 0.02)
    assert read_metric(metrics, "acc") == (0.3, None)
    with pytest.raises(KeyError):
        read_metric(metrics, "f1")


def test_the_leaderboards_tasks_are_all_there() -> None:
    names = {line.name for line in SUITES["hallucination"]}
    assert names == {
        *("nq_open", "nq8", "triviaqa", "tqa8", "truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa_gen"),
        *("fever10", "fever11", "truefalse_cieacf", "selfcheckgpt"),
        *(
            "xsum_v2",
            "cnndm_v2",
            "race",
            "squadv2",
            "memo-trap_v2",
            "ifeval",
            "nq_swap",
            "faithdial_hallu_v2",
        ),
        *("halueval_qa", "halueval_dialogue", "halueval_summarization"),
    }
    shots = {line.name: line.shots for line in SUITES["hallucination"]}
    wanted = {"nq_open": 64, "nq8": 8, "fever10": 16, "fever11": 8, "squadv2": 4, "nq_swap": 4}
    assert wanted.items() <= shots.items()

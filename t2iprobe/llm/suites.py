"""The leaderboard's tasks by class (Hallucinations Leaderboard, arXiv 2404.05904), and ours of WordNet.

A class's score is the plain mean of its tasks' primary metrics, each scaled to 0 … 1, as published. What the
harness has no data for without a hub stands in by a task of ours whose data come from a package; what has
neither is named, and not counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

__all__ = ["SUITES", "SuiteTask", "aggregate", "read_metric", "score_interval"]

FACTUALITY, FAITHFULNESS = "factuality", "faithfulness"
CLASSES = (FACTUALITY, FAITHFULNESS)


@dataclass(frozen=True)
class SuiteTask:
    """A line of a suite.

    name: as the leaderboard has it; kind: its class; hub: the harness's own task, whose data come from a hub;
    packaged: ours, whose data come from a package or from WordNet; metric and shots: the primary ones; scale:
    what the metric is divided by; note: how ours differs from the published task.
    """

    name: str
    kind: str
    metric: str
    shots: int
    hub: str | None = None
    packaged: str | None = None
    scale: float = 1.0
    note: str = ""

    def task(self, data: str) -> str | None:
        """Return the task to run with `data` from the hub or from packages."""
        return self.hub if data == "hub" else self.packaged


_F, _H = CLASSES
_HALUEVAL = "its data in our own, shorter instruction"
HALLUCINATION = (
    SuiteTask("nq_open", _F, "exact_match", 64, hub="nq_open"),
    SuiteTask("nq8", _F, "exact_match", 8, "nq_open", "t2iprobe_wikidata_qa", note="Wikidata's facts for NQ"),
    SuiteTask("triviaqa", _F, "exact_match", 64, hub="triviaqa"),
    SuiteTask("tqa8", _F, "exact_match", 8, hub="triviaqa"),
    SuiteTask(
        "truthfulqa_mc1", _F, "acc", 0, "truthfulqa_mc1", "t2iprobe_truthfulqa_mc1",
        note="299 questions of an early version",
    ),
    SuiteTask("truthfulqa_mc2", _F, "acc", 0, hub="truthfulqa_mc2"),
    SuiteTask("truthfulqa_gen", _F, "rougeL_acc", 0, hub="truthfulqa_gen"),
    SuiteTask("fever10", _F, "acc", 16, note="three classes: no packaged data"),
    SuiteTask("fever11", _F, "acc", 8, packaged="t2iprobe_fever", note="6,612 claims"),
    SuiteTask(
        "truefalse_cieacf", _F, "acc", 8, packaged="t2iprobe_misconceptions", note="misconceptions instead"
    ),
    SuiteTask(
        "selfcheckgpt", _F, "consistency", 0, packaged="t2iprobe_wn_selfcheck",
        note="descriptions of WordNet's nouns, n-grams instead of an entailment model",
    ),
    SuiteTask("xsum_v2", _H, "rougeL", 0, note="no packaged data"),
    SuiteTask(
        "cnndm_v2", _H, "rougeL", 0, "cnn_dailymail_abisee", "t2iprobe_cnndm", note="HaluEval's documents"
    ),
    SuiteTask("race", _H, "acc", 0, hub="race"),
    SuiteTask("squadv2", _H, "exact", 4, hub="squadv2", scale=100.0),
    SuiteTask("memo-trap_v2", _H, "acc", 0, hub="inverse_scaling_memo_trap"),
    SuiteTask("ifeval", _H, "prompt_level_strict_acc", 0, hub="ifeval"),
    SuiteTask("nq_swap", _H, "exact_match", 4, packaged="t2iprobe_nq_swap"),
    SuiteTask("faithdial_hallu_v2", _H, "acc", 8, note="no packaged data"),
    SuiteTask("halueval_qa", _H, "acc", 0, packaged="t2iprobe_halueval_qa", note=_HALUEVAL),
    SuiteTask("halueval_dialogue", _H, "acc", 0, packaged="t2iprobe_halueval_dialogue", note=_HALUEVAL),
    SuiteTask(
        "halueval_summarization", _H, "acc", 0, packaged="t2iprobe_halueval_summarization", note=_HALUEVAL
    ),
)  # fmt: skip
WORDNET = (
    SuiteTask("gloss swap", _F, "acc_mutual_info", 0, packaged="t2iprobe_wn_swap"),
    SuiteTask("is a kind of", _F, "acc", 8, packaged="t2iprobe_wn_isa"),
    SuiteTask("supported objects", _H, "supported", 0, packaged="t2iprobe_wn_supported"),
    SuiteTask("self-check", _H, "consistency", 0, packaged="t2iprobe_wn_selfcheck"),
    SuiteTask("caption trap", _H, "acc", 0, packaged="t2iprobe_wn_trap"),
)
SUITES: dict[str, tuple[SuiteTask, ...]] = {"hallucination": HALLUCINATION, "wordnet": WORDNET}


def read_metric(metrics: Mapping[str, Any], name: str, scale: float = 1.0) -> tuple[float, float | None]:
    """Return a metric's value and standard error in a task's results, whatever its filter, over `scale`.

    Raises KeyError where it is not there.
    """
    found = [key for key in metrics if key.partition(",")[0] == name]
    key = next((key for key in found if isinstance(metrics[key], int | float)), None)
    if key is None:
        raise KeyError(name)
    error = metrics.get(f"{name}_stderr,{key.partition(',')[2]}")
    return metrics[key] / scale, error / scale if isinstance(error, int | float) else None


def score_interval(value: float, stderr: float | None, documents: int | None) -> list[float] | None:
    """Return the 95 % interval of a mean over documents that score 0 to 1, None without a standard error.

    A document of 0 and one of 1 join the others, as in `intervals.bootstrap_probability`: a model that is
    never right on ten documents need not be so on all.
    """
    if stderr is None:
        return None
    centre, error = _join_two(value, stderr, documents)
    return _widen(value, centre, error)


def _join_two(value: float, stderr: float, documents: int | None) -> tuple[float, float]:
    """Return mean and standard error with a document of 0 and one of 1 more."""
    if not documents:
        return value, stderr
    count = documents + 2
    squares = stderr**2 * documents * (documents - 1) + documents * value**2 + 1
    mean = (documents * value + 1) / count
    return mean, sqrt(max(0.0, squares - count * mean**2) / (count - 1) / count)


def _widen(value: float, centre: float, error: float) -> list[float]:
    return [max(0.0, min(value, centre - 1.96 * error)), min(1.0, max(value, centre + 1.96 * error))]


def aggregate(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Return factuality and faithfulness from lines with kind, value, stderr and documents: unweighted means.

    The standard error takes tasks as independent; the interval at 95 % is that of `score_interval`'s means.
    None for a class without tasks.
    """
    found: dict[str, dict[str, Any] | None] = {}
    for kind in CLASSES:
        own = [line for line in lines if line["kind"] == kind]
        if not own:
            found[kind] = None
            continue
        value = sum(line["value"] for line in own) / len(own)
        stderr, interval = None, None
        if all(line["stderr"] is not None for line in own):
            stderr = sqrt(sum(line["stderr"] ** 2 for line in own)) / len(own)
            joined = [_join_two(line["value"], line["stderr"], line.get("documents")) for line in own]
            centre = sum(mean for mean, _ in joined) / len(own)
            interval = _widen(value, centre, sqrt(sum(error**2 for _, error in joined)) / len(own))
        found[kind] = {"value": value, "stderr": stderr, "interval": interval, "tasks": len(own)}
    return found

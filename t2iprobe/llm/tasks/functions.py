"""What the YAML tasks in this folder call: their rows, and how an answer is scored."""

from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from t2iprobe.llm import suite_data
from t2iprobe.llm.suite_scores import (
    is_exact,
    measure_rouge,
    measure_self_consistency,
    score_judgement,
    score_support,
)

if TYPE_CHECKING:
    from datasets import DatasetDict

SAMPLES = 5


def _split(rows: list[dict[str, Any]]) -> "DatasetDict":
    """Return a fifth of the rows, 200 at most, as demonstrations, and the others as the test."""
    from datasets import Dataset, DatasetDict

    shown = min(len(rows) // 5, 200)
    return DatasetDict(train=Dataset.from_list(rows[:shown]), test=Dataset.from_list(rows[shown:]))


def load(source: str, **_: Any) -> "DatasetDict":
    """Return the rows of one of `suite_data.SOURCES`."""
    return _split(suite_data.SOURCES[source]())


def match_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a short answer against its aliases."""
    return {"exact_match": float(is_exact(results[0], doc["answers"]))}


def judge(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a Yes or No."""
    return score_judgement(results[0], doc["hallucinated"])


def summarise(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a summary by ROUGE-L, 0 to 1."""
    return {"rougeL": measure_rouge(results[0], doc["summary"])}


def support(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a caption by what nothing in WordNet ties to its synset."""
    return score_support(results[0], doc["synset"])


def check_self(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return the agreement of the first answer with the others, and whether it was empty."""
    return measure_self_consistency(results[0], results[1:])


class SelfCheck(ConfigurableTask):
    """Ask once greedily and several times at temperature 1, and score how well the answers agree.

    The n-gram variant of SelfCheckGPT (arXiv 2303.08896): it needs no second model. An answer without
    content counts as inconsistent: empty answers agree with each other.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config={key: value for key, value in (config or {}).items() if key != "class"})

    def construct_requests(self, doc: dict, ctx: Any, **kwargs: Any) -> list[Instance]:
        """Return the greedy request and those at temperature 1."""
        first = super().construct_requests(doc, ctx, **kwargs)
        assert isinstance(first, Instance)
        context, settings = first.args[:2]
        drawn = settings | {"do_sample": True, "temperature": 1.0}
        again = [
            Instance(
                request_type=first.request_type,
                doc=doc,
                arguments=(context, dict(drawn)),
                idx=number + 1,
                **{key: kwargs[key] for key in ("metadata",) if key in kwargs},
            )
            for number in range(SAMPLES)
        ]
        return [first, *again]

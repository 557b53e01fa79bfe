"""The commands of ``llm corpus``, one after the other, and what a person may get wrong."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.errors import UserError


def corpus(*words: object) -> str:
    given = ["llm", "corpus", *map(str, words)]
    return CliRunner().invoke(app, given, catch_exceptions=False).stdout


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    texts = [f"A photo of {number} red foxes in the snow beside an old lighthouse." for number in range(40)]
    texts[5:8] = ["masterpiece, best quality, 8k, 8k, {subject}", texts[4], texts[3] + " at dusk"]
    lines = [json.dumps({"id": f"c{number}", "text": text}) for number, text in enumerate(texts)]
    lines.insert(10, "no row")
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_from_captions_to_what_is_kept(captions: Path, tmp_path: Path) -> None:
    signals, kept, unique = (tmp_path / name for name in ("signals.jsonl.gz", "kept.jsonl", "unique.jsonl"))

    told = corpus("signals", captions, "-o", signals)
    assert told.startswith("40 rows, 1 too short for a MinHash of 13; 1 lines are no rows: ")
    told = corpus("filter", captions, signals, "--recipe", "caption", "-o", kept, "--report")
    assert "        1       0  t2i_template_leakage ≤ 0" in told
    assert "masterpiece, best quality" in told
    assert "39 of 40 rows; 1 lines are no rows" in told
    found = json.loads(corpus("dedup", kept, "-o", unique, "--similarity", "0.99", "--json"))
    assert (found["rows"], found["kept"], found["exact_duplicates"]) == (39, 38, 1)
    lines = captions.read_bytes().splitlines(True)
    assert set(unique.read_bytes().splitlines(True)) <= set(lines)


def test_a_target_adds_its_signals(captions: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"buy {number} cheap pills now, click here\n" for number in range(30)))
    told = corpus("train", "--target", captions, "--source", other, "-o", tmp_path / "t.npz")
    assert told.startswith("40 texts of the target, 30 others; ")
    corpus("signals", captions, "--target", tmp_path / "t.npz", "-o", tmp_path / "signals.jsonl")
    row = json.loads((tmp_path / "signals.jsonl").read_text().splitlines()[0])
    assert row["quality_signals"]["rps_doc_target_importance"][0][2] > 0
    told = corpus(
        "filter", captions, tmp_path / "signals.jsonl", "--recipe", "dsir", "-o", tmp_path / "half.jsonl"
    )
    assert told.startswith("20 of 40 rows")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["signals", "IN", "-o", "OUT", "--language", "xx"], "no stop words for the language 'xx'"),
        (["signals", "IN", "-o", "OUT", "--shingle", "0"], "a shingle is a number of words"),
        (["signals", "IN", "-o", "OUT", "--tokenizer", "nowhere"], r"no tokenizer\.json in nowhere"),
        (["signals", "IN", "-o", "OUT", "--domains", "IN"], "cannot read domain numbers"),
        (["signals", "IN", "-o", "OUT", "--target", "IN"], "cannot read the target"),
        (["signals", "IN", "-o", "OUT", "--processes", "0"], "there is 1 process or more"),
        (["signals", "IN", "-o", "OUT", "--longest-line", "1"], "a line may be 2 bytes"),
        (["signals", "IN", "-o", "IN"], "is the input"),
        (["signals", "nowhere.jsonl", "-o", "OUT"], "there is no file"),
        (["dedup", "IN", "-o", "OUT", "--similarity", "1.5"], "a similarity is above 0 and at most 1"),
        (["dedup", "IN", "-o", "IN"], "is the input"),
        (["dedup", "IN", "-o", "OUT", "--bands", "shure"], "no choice 'shure', did you mean sure"),
        (["dedup", "IN", "-o", "OUT", "--hasher", "md5"], "no choice 'md5'"),
        (["filter", "IN", "IN", "-o", "OUT", "--recipe", "caption"], "that is no row of corpus signals"),
        (["filter", "IN", "IN", "-o", "OUT", "--recipe", "dsir"], "that is no row of corpus signals"),
        (["filter", "IN", "IN", "-o", "IN", "--recipe", "caption"], "is the input"),
        (["filter", "IN", "IN", "-o", "OUT", "--recipe", "captoin"], "did you mean caption"),
        (["train", "--target", "IN", "--source", "IN", "-o", "OUT", "--limit", "3"], "a limit of 20 texts"),
    ],
)
def test_mistakes_leave_nothing(captions: Path, tmp_path: Path, words: list[str], message: str) -> None:
    named = {"IN": captions, "OUT": tmp_path / "out"}
    with pytest.raises(UserError, match=message):
        corpus(*(named.get(word, word) for word in words))
    assert [path.name for path in tmp_path.iterdir()] == ["captions.jsonl"]

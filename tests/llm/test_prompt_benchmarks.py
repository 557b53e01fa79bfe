"""The benchmarks of prompts and of the harness, from end to end on a toy."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from language_toys import make_toy, save_toy

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _find_benchmarks() -> Iterator[None]:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("target") / "toy"
    return str(save_toy(folder, make_toy(layers=2, context=4096).float()))


@pytest.mark.slow
def test_faithfulness_prints_its_table_and_is_continued(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = importlib.import_module("prompt_faithfulness")
    words = ["--model", target, "--synsets", "6", "--rounds", "1", "--out", str(tmp_path / "out")]
    assert benchmark.main([*words, "--json", str(tmp_path / "found.json")]) == 0
    table = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["captions"], row["swap"]) for row in found["signals"]] == [
        ("plain", "sibling"), ("plain", "stranger"), ("written", "sibling"),
    ]  # fmt: skip
    row = found["signals"][0]
    assert f"| plain | its sibling | {row['pairs']} | {row['gloss_pmi']['value']:.3f}" in table
    assert row["unsupported"]["value"] >= 0.5  # a sibling's name is an object that the gloss lacks, or a tie
    assert benchmark.main(words) == 0
    assert capsys.readouterr().out == table


@pytest.mark.slow
def test_parity_tells_equal_models(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    benchmark = importlib.import_module("harness_parity")
    words = ["--model", target, "--items", "16", "--texts", "4", "--draft", "lookup"]
    assert benchmark.main([*words, "--json", str(tmp_path / "found.json")]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["items"] for row in rows] == [8, 8, 4]
    assert rows[0]["largest_difference"] < 1e-3
    assert "4 of 4 texts the same" in capsys.readouterr().out


@pytest.mark.slow
def test_hallucination_compares_with_random_weights(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    benchmark = importlib.import_module("hallucination")
    words = ["--model", target, "--suite", "wordnet", "--limit", "4", "--draft", "none"]
    assert benchmark.main([*words, "--work", str(tmp_path), "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    table = capsys.readouterr().out
    for name in ("model", "random weights"):
        assert found[name]["factuality"]["tasks"] == 2
        assert f"{found[name]['factuality']['value']:.3f}" in table
    assert found["model"]["settings"]["model"] != found["random weights"]["settings"]["model"]
    # Never right on four documents: that is no certainty.
    assert all(line["interval"][1] > 0 for line in found["random weights"]["t2iprobe"])


def test_template_spread_compares_models(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = importlib.import_module("template_spread")
    other, data = save_toy(tmp_path / "other", make_toy(seed=5)), tmp_path / "own.csv"
    rows = [f"{word} {n},{label}\n" for n in range(8) for word, label in (("dog", "aa"), ("sea", "b"))]
    data.write_text("text,label\n" + "".join(rows))
    words = ["--model", target, "--model", str(other), "--data", str(data), "--count", "4", "--ensemble", "2"]
    words += ["--limit", "6", "--work", str(tmp_path / "work")]
    assert benchmark.main([*words, "--json", str(tmp_path / "found.json")]) == 0
    table = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())[str(data)]
    assert len(found["runs"]) == 12
    assert table.count("| own | ") == 6
    run, grown, others = found["runs"][1], found["ensembles"][1]["sizes"][1], found["runs"][7]
    assert (run["method"], others["method"], others["model"]) == ("channel", "channel", str(other))
    assert f"| own | channel | 0 | {sum(run['scores']) / 4:.3f} |" in table
    assert f"{grown['mean']:.3f} | {grown['sd']:.3f} | {grown['gain']['value']:+.3f}" in table
    assert f"] | {sum(others['scores']) / 4:.3f} |" in table
    assert benchmark.main(words) == 0
    assert capsys.readouterr().out == table
    assert benchmark.main(["--data", "vadr", *words[:4], "--work", str(tmp_path / "w")]) == 2

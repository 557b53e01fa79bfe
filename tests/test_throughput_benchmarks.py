"""The benchmarks of throughput: verdicts that can say no, whole runs on toys, continued ones, real kills."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from language_toys import make_toy, save_toy

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.decoder import Decoder

FOLDER = Path(__file__).parents[1] / "benchmarks"
SENTENCES = ("a heron at dusk", "seven cups of tea", "the old lighthouse", "zebra ink", "rain on a dog")


@pytest.fixture(scope="module", autouse=True)
def _find_benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    sys.path.insert(0, str(FOLDER))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    sys.path.remove(str(FOLDER))


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_toy(layers=12).float()
    model.config.max_position_embeddings = 1024
    return save_toy(tmp_path_factory.mktemp("target") / "toy", model)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": text} for text in SENTENCES]
    rows.append({"messages": [{"role": "user", "content": "a cup"}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made_up(**changes: Any) -> dict[str, bool]:
    """Verdicts, by their claims' first words, where accelerate writes 10 tokens a second."""
    given = {"block": 60.0, "packed": 90.0, "predicted": 66.0, "bytes": 100, "peak": 90, "chosen": 9.5}
    given |= {"differs": None, "grown": 99} | changes
    report = load("throughput_report")

    def turn(rate: float, number: int, **more: Any) -> dict[str, Any]:
        return {
            "texts": 8, "tokens": 32, "seconds": 32 / rate * (1 + 0.01 * number), "prompt_seconds": 0.1,
            "bytes": 3200, "differs": [None], "limit": 99.0, "bound_by": "link",
        } | more  # fmt: skip

    def block(rate: float, number: int, **more: Any) -> dict[str, Any]:
        counted = {"bytes": 32 * given["bytes"], "streamed_bytes": 800, "passes": 4}
        return turn(rate, number, predicted=rate * 1.1, peak_bytes=given["peak"], **counted) | more

    kept: dict[str, Any] = {"sizes": {"placements": {}}, "policies": {}}
    for number in range(3):
        kept |= {
            f"{number}/hardware": "{}",
            f"{number}/accelerate": turn(10, number),
            f"{number}/accelerate, whole model": turn(8, number),
            f"{number}/ours, row by row": turn(12, number),
            f"{number}/ours, zig-zag, block of 2": block(
                given["block"], number, predicted=given["predicted"], differs=[given["differs"]]
            ),
            f"{number}/ours, zig-zag, block of 2, 4 bits": block(given["packed"], number, differs=None),
            f"{number}/lossless: chosen": block(given["chosen"], number),
            f"{number}/lossless: 2 × 8, weights first": block(10.0, number),
            f"{number}/lossless: 4 × 8, weights first": block(6.0, number),
        }
    kept["memory"] = {"float32": {"grown_bytes": given["grown"], "ledger_bytes": 90}}
    found = report.compare(kept, 100)
    shown = report.table(found | {"verdicts": report.judge(found), "notes": ["seen"]})
    assert "| ours, zig-zag, block of 2 | 8 | " in shown
    assert found["rows"]["ours, row by row"]["times_accelerate"]["value"] == pytest.approx(1.2)
    return {verdict["claim"]: verdict["holds"] for verdict in report.judge(found)}


def test_verdicts_on_throughput_can_say_yes_and_no() -> None:
    good = made_up()
    assert len(good) == 8
    assert all(good.values())
    for changes, claim in (
        ({"block": 45.0, "predicted": 45.0}, "ours, zig-zag, block of 2: at least 5 times the faster"),
        ({"packed": 45.0}, "ours, zig-zag, block of 2, 4 bits: at least 5 times"),
        ({"bytes": 106}, "weight bytes a token within 5% of W / block"),
        ({"predicted": 80.0}, "predicted tokens a second within 25%"),
        ({"predicted": 40.0}, "predicted tokens a second within 25%"),
        ({"peak": 101}, "no block takes more than the budget"),
        ({"chosen": 8.0}, "lossless: the chosen placement at least 0.9 times"),
        ({"grown": 101}, "the command's process grows by less than the budget"),
        ({"differs": {"at": 3, "gap": 0.1}}, "all lossless texts are the model's own"),
    ):
        wrong = [each for each, holds in made_up(**changes).items() if not holds]
        assert len(wrong) == 1, (changes, wrong)
        assert wrong[0].startswith(claim)


@pytest.mark.slow
def test_blocks_are_measured_and_continued(
    toy: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    throughput = load("throughput")
    arguments = ["--quick", "--model", str(toy), "--prompts", str(prompts), "--prompt-tokens", "4"]
    arguments += ["--share", "0.5", "--link", "0.002", "--work", str(tmp_path / "work")]
    arguments += ["--json", str(tmp_path / "found.json")]
    throughput.main(arguments)
    shown = capsys.readouterr().out
    assert "all lossless texts are the model's own but for ties under 0.001: **yes**" in shown
    assert "weight bytes a token within 5% of W / block: **yes**" in shown
    assert "no block takes more than the budget" in shown
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["rows"]
    nbytes = sum(each.nbytes for each in make_toy(layers=12).float().model.layers.parameters())
    assert rows["accelerate"]["weight_bytes_per_token"] * rows["accelerate"]["texts"] == pytest.approx(nbytes)
    one, two = (rows[f"ours, zig-zag, block of {count}"] for count in (1, 2))
    assert two["texts"] == 2 * one["texts"]
    assert two["weight_bytes_per_token"] == pytest.approx(two["bytes_per_token_of_a_block"])
    assert (
        rows["ours, zig-zag, block of 2, 4 bits"]["weight_bytes_per_token"]
        < 0.5 * two["weight_bytes_per_token"]
    )
    for name, row in rows.items():
        assert row["turns"] == 2
        assert row["tokens_per_second"]["value"] <= 1.05 * row["limit"] or "bits" in name
    assert {"lossless: chosen", "4 bits allowed: chosen"} <= rows.keys()
    assert found["memory"].keys() == {"float32", "4 bits"}
    assert found["policies"].keys() == {"lossless", "4 bits allowed"}
    kept = tmp_path / "work" / "turns.json"
    before = json.loads(kept.read_text())
    killed = {key: value for key, value in before.items() if key != "1/accelerate"}
    kept.write_text(json.dumps(killed))
    throughput.main(arguments)
    after = json.loads(kept.read_text())
    assert after.keys() == before.keys()
    assert all(after[key] == value for key, value in killed.items())
    with pytest.raises(UserError, match="another model or other settings"):
        throughput.main([*arguments, "--link", "0.003"])


def test_what_a_text_loses_is_the_models_own_loss() -> None:
    perplexity = load("throughput_perplexity")
    model = make_toy()
    texts = torch.randint(40, (3, 21), generator=torch.Generator().manual_seed(0))
    for rows in (1, 6, 20, 50):
        found = perplexity.score_texts(Decoder(make_toy()), texts, None, rows)
        for text, lost in zip(texts, found, strict=True):
            assert lost == pytest.approx(20 * float(model(text[None], labels=text[None]).loss), rel=1e-6)
    exact, packed = (perplexity.score_texts(Decoder(make_toy()), texts, bits, 4) for bits in (None, 4))
    assert packed != exact
    assert packed == pytest.approx(exact, rel=0.2)


def test_perplexity_is_reported_of_real_text(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    perplexity = load("throughput_perplexity")
    arguments = ["--model", str(toy), "--texts", "5", "--tokens", "24", "--work", str(tmp_path / "work")]
    perplexity.main([*arguments, "--json", str(tmp_path / "found.json")])
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert len(rows) == 8
    for row in rows:
        low, high = row["ratio"]["interval"]
        assert low <= row["ratio"]["value"] <= high
        assert (row["ratio"]["value"] == 1) == (row["kind"] == "float32")
        assert f"| {row['kind']} | {row['perplexity']['value']:.2f} [" in shown
    kept = tmp_path / "work" / "losses.json"
    before = json.loads(kept.read_text())
    kept.write_text(json.dumps({key: value for key, value in before.items() if "cache" not in key}))
    perplexity.main(arguments)
    assert json.loads(kept.read_text()) == before
    assert capsys.readouterr().out == shown


@pytest.mark.slow
def test_the_synsets_are_written_although_it_is_killed(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synsets = load("throughput_synsets")
    arguments = ["--model", str(toy), "--synsets", "40", "--memory", "2MB", "--batch", "2", "--block", "1"]
    arguments += ["--new-tokens", "4", "--kill-at", "0.2", "--work", str(tmp_path / "work")]
    synsets.main([*arguments, "--json", str(tmp_path / "found.json")])
    shown = capsys.readouterr().out
    assert "every prompt has its text once, in order: **yes**" in shown
    assert "is still there, byte for byte: **yes**" in shown
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["prompts"] == 160
    assert 32 <= found["texts_when_killed"] == found["continued_behind"] < 160
    lines = (tmp_path / "work" / "texts.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "work" / "texts.jsonl").write_bytes(b"".join(lines[:50] + lines[49:]))  # as if doubled
    synsets.main(arguments)
    assert "every prompt has its text once, in order: **no**" in capsys.readouterr().out

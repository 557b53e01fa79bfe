"""The commands of `t2iprobe llm` on toy models: what is printed, what is counted, what is refused."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import decoder_toys
import pytest
import torch
from language_toys import WORDS, blur, make_toy, save_toy, write_plainly
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.errors import UserError
from t2iprobe.llm.commands import (
    choose_trees,
    encode_prompt,
    load_engine,
    parse_bytes,
    plan_trees,
    read_prompts,
    write_texts,
)
from t2iprobe.llm.engine.generation import Trees, generate
from t2iprobe.llm.models import decoder_layers


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("target") / "toy", make_toy(layers=6))


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("smaller") / "toy", blur(make_toy(layers=6)))


def layer_bytes() -> int:
    model = make_toy(layers=1)
    return sum(p.nbytes for p in model.model.layers.parameters())


def own_bytes(model: Any) -> int:
    """What is not in the layers: embedding, head, norm."""
    layers = sum(p.nbytes for p in model.model.layers.parameters())
    return sum(p.nbytes for p in model.parameters()) - layers


def until_end(tokens: list[int]) -> list[int]:
    """Cut behind the token that ends a text."""
    return tokens[: tokens.index(1) + 1] if 1 in tokens else tokens


@pytest.mark.parametrize("memory", [None, "tight", "half"])
@pytest.mark.parametrize("draft", ["none", "lookup", "early-exit:2", "copy:8", "copy:3", "smaller"])
def test_every_draft_in_every_memory_writes_the_targets_text(
    target: Path, smaller: Path, draft: str, memory: str | None
) -> None:
    model = make_toy(layers=6)
    name = str(smaller) if draft == "smaller" else draft
    with load_engine(str(target), name, memory=10**9, dtype="float64") as roomy:  # what the draft takes
        assert roomy.store is not None
        fixed = roomy.resident_bytes() - roomy.store.counters.resident_peak_bytes
    assert fixed - (own := own_bytes(model)) >= {"early-exit:2": 2 * layer_bytes(), "smaller": own}.get(
        draft, 0
    )
    budget = {None: None, "tight": fixed + 8192 + layer_bytes(), "half": fixed + 4 * (layer_bytes() + 8192)}
    with load_engine(str(target), name, memory=budget[memory], dtype="float64") as engine:
        prompts = ["a heron", "tea"]
        ids = [encode_prompt(engine, {"prompt": text}) for text in prompts]
        for growth in ("best-first", "optimal", "chain"):
            if memory is None or growth == "best-first":
                rows = [{"prompt": text} for text in prompts]
                trees = choose_trees(engine, growth, 8, 6, "auto")
                found = list(write_texts(engine, rows, trees=trees, max_new_tokens=20, batch=2))
                for made, prompt in zip(found, ids, strict=True):
                    assert made["token_ids"] == until_end(write_plainly(model, prompt, 20))
                    assert (made["weight_bytes_read"] > 0) == (memory is not None)
        if memory is not None:
            assert engine.store is not None
            counters = engine.store.counters
            streamed = [layer for layer in range(6) if layer not in engine.store.resident]
            each = sum(engine.store.source.traffic(layer) for layer in streamed)
            assert counters.bytes_used == counters.passes * each
            assert engine.resident_bytes() <= budget[memory]  # the draft's weights, too
            assert (len(engine.store.resident) > 0) == (memory == "half")


@pytest.mark.parametrize("family", ["gemma3 with pictures", "gemma4", "qwen3 with experts"])
def test_awkward_models_write_their_text_from_any_memory(family: str, tmp_path: Path) -> None:
    words = WORDS[: decoder_toys.VOCABULARY]
    model = decoder_toys.tiny_model(family, torch.float32)
    folder = str(save_toy(tmp_path / "toy", model, words=words))
    prompt = torch.tensor([[words.index(letter) for letter in "heron"]])
    plain = model.generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    for draft, memory in (("early-exit:2", None), ("early-exit:2", 10**9), ("copy:8", None), ("none", 10**9)):
        with load_engine(folder, draft, memory=memory) as engine:
            trees = choose_trees(engine, "best-first", 4, 4, "auto")
            (made,) = generate(engine.target, engine.draft, prompt, trees=trees, max_new_tokens=12)
            assert made.token_ids == plain[0, prompt.shape[1] :].tolist()
            if draft == "early-exit:2":
                layers = decoder_layers(engine.draft.decoder.model)
                for layer, whole in zip(layers, decoder_layers(model), strict=False):
                    for name, each in layer.state_dict().items():
                        assert torch.equal(each, whole.state_dict()[name])


def test_no_early_exit_from_layers_that_read_each_others_keys(tmp_path: Path) -> None:
    model = decoder_toys.tiny_model("gemma4 with shared keys", torch.float32)
    folder = save_toy(tmp_path / "toy", model, words=WORDS[: decoder_toys.VOCABULARY])
    for memory in (None, 10**9):
        with pytest.raises(UserError, match="not in parts"):
            load_engine(str(folder), "early-exit:2", memory=memory)


def test_generate_prints_one_object(target: Path) -> None:
    words = ["llm", "generate", "a heron", "--model", str(target), "--draft", "lookup", "--budget", "8"]
    words += ["--max-new-tokens", "12", "--dtype", "float64", "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert set(made) == {
        *("token_ids", "text", "target_passes", "draft_passes", "tokens_per_pass", "weight_bytes_read"),
        *("resident_peak_bytes", "seconds", "stop_reason", "prompt"),
    }
    prompt = torch.tensor([WORDS.index(letter) if letter in WORDS else 2 for letter in "a heron.:"])
    assert made["token_ids"] == until_end(write_plainly(make_toy(layers=6), prompt, 12))
    assert made["tokens_per_pass"] == len(made["token_ids"]) / made["target_passes"]
    assert made["resident_peak_bytes"] == sum(p.nbytes for p in make_toy(layers=6).parameters())
    streamed = CliRunner().invoke(app, words)
    assert streamed.stdout == made["text"] + "\n"
    stop = made["text"][3:5]
    stopped = CliRunner().invoke(app, [*words, "--stop", stop])
    assert stopped.stdout == made["text"][: made["text"].index(stop)] + "\n"
    assert f"{len(made['token_ids'])} tokens in" in streamed.stderr


def test_a_file_of_prompts_gives_a_line_for_each(target: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "tea", "id": 7},
        {"messages": [{"role": "user", "content": "tea"}]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    words = ["llm", "generate", "--prompts", str(file), "--model", str(target), "--draft", "none"]
    result = CliRunner().invoke(
        app, [*words, "--max-new-tokens", "5", "--dtype", "float64", "--device", "cpu"]
    )
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["token_ids"] == second["token_ids"]
    assert (first["id"], second["messages"]) == (7, rows[1]["messages"])


def test_a_prompt_that_is_too_long_is_told_before_any_is_written(target: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in ("tea", "a" * 300, "tea")))
    words = ["llm", "generate", "--prompts", str(file), "--model", str(target), "--draft", "none"]
    result = CliRunner().invoke(app, [*words, "--device", "cpu"])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith("prompt 2: the prompt has 302 tokens")
    assert result.stdout == ""


def test_the_text_arrives_in_parts_and_whole(target: Path) -> None:
    """Also where its last character is cut: a prompt's text is what its parts are."""
    with load_engine(str(target), "lookup", dtype="float64") as engine:
        decode = engine.tokenizer.decode
        half = "\N{REPLACEMENT CHARACTER}"  # of a character
        engine.tokenizer.decode = lambda tokens, **how: decode(tokens, **how) + half
        told: dict[int, list[str]] = {0: [], 1: []}
        rows = [{"prompt": "tea"}, {"prompt": "a heron"}]
        found = list(
            write_texts(
                engine, rows, trees=Trees("best-first", 4), max_new_tokens=12, batch=2,
                on_text=lambda row, text: told[row].append(text),
            )
        )  # fmt: skip
    for row, made in enumerate(found):
        assert "".join(told[row]) == made["text"]
        assert len(told[row]) > 2


def test_token_0_may_end_a_text(target: Path) -> None:
    with load_engine(str(target), "none") as engine:
        assert engine.eos_token_ids == {1}
        for own, expected in ((0, {0}), ([0, 5], {0, 5}), (None, {engine.tokenizer.eos_token_id})):
            engine.target.model.generation_config.eos_token_id = own
            assert engine.eos_token_ids == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("300MB", 300_000_000), ("1.5 GiB", 1_610_612_736), ("4096", 4096), ("2kb", 2000), ("7B", 7)],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_the_plan_measures_and_chooses(target: Path) -> None:
    with load_engine(str(target), "early-exit:2", dtype="float64") as engine:
        found = plan_trees(engine, measure=True)
        rows = {(row["budget"], row["depth"]): row for row in found["table"]}
        assert found["choice"] == min(found["table"], key=lambda row: row["token_seconds"])
        assert rows[0, 0]["token_seconds"] == pytest.approx(found["target_seconds"][1])
        again = plan_trees(engine)
        assert again["target_seconds"] == found["target_seconds"]  # kept
        trees = choose_trees(engine, "best-first", None, 24, "auto")
        assert trees.budget.choose(again_acceptance := trees_acceptance(trees)) == (  # type: ignore[union-attr]
            found["choice"]["budget"],
            found["choice"]["depth"],
        ), again_acceptance
    result = CliRunner().invoke(
        app, ["llm", "plan", "--model", str(target), "--draft", "early-exit:2", "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    assert "tokens a pass" in result.stdout
    assert result.stdout.count("←") == 1


def trees_acceptance(trees: Trees) -> Any:
    from t2iprobe.llm.engine.sizing import Acceptance

    return Acceptance(trees.acceptance)


def test_a_cache_that_cannot_be_written_is_told_or_done_without(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write .*packed.*: Not a directory"):
        load_engine(str(target), "none", memory=10**6)
    with load_engine(str(target), "lookup") as engine:
        assert choose_trees(engine, "best-first", None, 24, "auto").growth == "best-first"
    assert (tmp_path / "file").read_text() == "no folder"


def test_bench_compares_trees(target: Path) -> None:
    words = ["llm", "bench", "--model", str(target), "--draft", "early-exit:3", "--budget", "4"]
    result = CliRunner().invoke(app, [*words, "--max-new-tokens", "10", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["trees"]
    assert [row["tree"] for row in found] == ["none", "best-first", "optimal", "chain"]
    assert found[0]["tokens_per_pass"] == 1.0
    assert all(row["tokens_per_pass"] >= 1 for row in found)


def test_what_cannot_be_is_told_in_a_line(target: Path, tmp_path: Path) -> None:
    foreign = save_toy(tmp_path / "foreign", make_toy(vocabulary=40), words=[*WORDS[:-1], "!"])
    for arguments, match in (
        ({"draft": "tree"}, "there is no draft 'tree'"),
        ({"draft": "early-exit:6"}, "has 6 layers: exit after fewer"),
        ({"draft": "early-exit"}, "needs a number"),
        ({"draft": "early-exit:²"}, "needs a number"),
        ({"draft": f"early-exit:{'9' * 5000}"}, "needs a number"),
        ({"draft": "a" * 300}, "there is no draft 'aaa"),
        ({"draft": "~nobody-of-that-name"}, "there is no draft '~nobody"),
        ({"draft": "copy:5"}, "2, 3, 4 or 8 bits"),
        ({"draft": "copy:²"}, "needs a number"),
        ({"draft": str(foreign)}, "another vocabulary"),
        ({"draft": "student"}, "drafts only for SmolLM2"),
        ({"draft": "none", "memory": 10_000}, "memory budget of 10000 bytes is too small"),
        ({"draft": "none", "link": 10_000}, "nothing is read through the link"),
    ):
        if (
            arguments["draft"] == "student"
            and not (Path(__file__).parents[2] / "t2iprobe/assets/draft_model").exists()
        ):
            continue
        with pytest.raises(UserError, match=match):
            load_engine(str(target), **arguments)  # type: ignore[arg-type]
    with load_engine(str(target), "none") as engine:
        for growth, budget, match in (("bush", None, "no tree 'bush'"), ("chain", -3, "budget and depth")):
            with pytest.raises(UserError, match=match):
                choose_trees(engine, growth, budget, 6, "auto")
    for much in ("much", "9" * 400):
        with pytest.raises(UserError, match="write it as 300MB"):
            parse_bytes(much)
    (tmp_path / "prompts.jsonl").write_text('\ufeff{"prompt": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.jsonl") == [{"prompt": "a\u2028b\u0085c"}]
    for content, match in (
        ("", "holds no prompts"),
        ('{"text": 1}', 'line 1: write {"prompt"'),
        ("{", "line 1"),
        ('{"messages": [[{"role": "user", "content": "tea"}]]}', "line 1: write"),
        ('{"prompt": "tea", "messages": "tea"}', "line 1: write"),
        ("[" * 100_000, "line 1: write"),
        (
            '{"prompt": "tea"}\n{"prompt": "a \\ud800 heron"}',
            "prompts.jsonl, line 2: half of a surrogate pair",
        ),
        ('{"prompt": "tea", "meta": ["\\udfff"]}', "line 1: half of a surrogate pair"),
    ):
        (tmp_path / "prompts.jsonl").write_text(content)
        with pytest.raises(UserError, match=match):
            read_prompts(tmp_path / "prompts.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("words", "given", "name"),
    [
        (["a \udcff b"], None, "the prompt"),
        (["tea", "--system", "\udcff"], None, "--system"),
        (["tea", "--stop", "e", "--stop", "\udcff"], None, "--stop"),
        (["-"], b"a \xff b", "the prompt"),
    ],
)
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_words_that_are_not_utf8(
    monkeypatch: pytest.MonkeyPatch, words: list[str], given: bytes | None, name: str, errors: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given or b""), "utf-8", errors))
    with pytest.raises(UserError, match=f"^{name} is not UTF-8$"):
        app(["llm", "generate", *words], standalone_mode=False)


def test_help_loads_no_heavy_module() -> None:
    code = (
        "import sys; from t2iprobe.cli import app\n"
        "from typer.testing import CliRunner\n"
        "assert 'speculat' not in CliRunner().invoke(app, ['llm', '--help']).output\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

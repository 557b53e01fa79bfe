"""The language engine's benchmarks: replays against real passes, links, counters, verdicts, whole runs."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from language_toys import VOCABULARY, blur, make_toy
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.engine.drafts import LookupDraft, ModelDraft
from t2iprobe.llm.engine.generation import Trees, generate

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _find_benchmarks() -> Iterator[None]:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def common(_find_benchmarks: None) -> ModuleType:
    return importlib.import_module("language_common")


@pytest.fixture(scope="module")
def speculation(_find_benchmarks: None) -> ModuleType:
    return importlib.import_module("speculation")


@pytest.fixture(scope="module")
def offload(_find_benchmarks: None) -> ModuleType:
    return importlib.import_module("offload")


@pytest.fixture(scope="module")
def identity(_find_benchmarks: None) -> ModuleType:
    return importlib.import_module("greedy_identity")


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model's folder: a random Llama of three layers whose words are t0 … t39."""
    folder = tmp_path_factory.mktemp("toy_language_model")
    make_toy().float().save_pretrained(folder)
    words = Tokenizer(WordLevel({f"t{word}": word for word in range(VOCABULARY)}, unk_token="t2"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t2", eos_token="t1").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def toy_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    tasks = ("caption", "scene", "list", "general")
    rows = [{"task": task, "prompt": f"t{5 + 3 * i} t7 t{30 - i}"} for i, task in enumerate(tasks * 3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def make_text(common: ModuleType, target: Any, prompt: list[int], count: int, **more: Any) -> Any:
    made = common.decode(target, torch.tensor(prompt), count, (), output_logits=True)
    best = [each[0].topk(2).values for each in made.logits]
    tokens = made.sequences[0, len(prompt) :].tolist()
    return common.Text("caption", 0, prompt, tokens, [float(b[0] - b[1]) for b in best], **more)


@pytest.mark.parametrize("growth", ["best-first", "optimal", "chain"])
@pytest.mark.parametrize("kind", ["model", "lookup"])
def test_replays_count_the_passes_of_real_runs(
    common: ModuleType, speculation: ModuleType, growth: str, kind: str
) -> None:
    target = make_toy()
    for prompt in ([5, 7, 9, 11], [3, 8]):
        text = make_text(common, target, prompt, 60)
        draft: Any = ModelDraft(Decoder(blur(target))) if kind == "model" else LookupDraft(VOCABULARY)
        for budget in (1, 6, 40):
            trees = Trees(growth, budget)
            (real,) = generate(Decoder(target), draft, [text.begin], trees=trees, max_new_tokens=60)
            assert real.token_ids == text.tokens
            known: Any = draft
            if growth != "best-first" and kind == "model":
                known = speculation.KnownDraft(common.record_guesses(draft, text), text, VOCABULARY)
            (replayed,) = generate(
                speculation.KnownTarget(Decoder(target), text), known, [text.begin], trees=trees,
                max_new_tokens=60,
            )  # fmt: skip
            assert replayed.rounds == real.rounds, (budget, prompt)
        assert kind == "lookup" or real.tokens_per_pass > 1.3


def test_acceptance_is_counted_as_by_hand(common: ModuleType) -> None:
    target = make_toy()
    twin = blur(target)
    text = make_text(common, target, [5, 7, 9], 40)
    ranks = common.record_guesses(ModelDraft(Decoder(twin)), text).ranks(text)
    expected = []
    for place, token in enumerate(text.tokens):
        logits = twin(text.ids[None, : len(text.prompt) + place]).logits[0, -1]
        expected.append(int((logits > logits[token]).sum()))
    assert ranks.tolist() == [min(rank, common.KEPT) for rank in expected]
    vector = common.acceptance_vector([ranks, ranks])
    assert vector[0] == pytest.approx(expected.count(0) / 40)
    assert vector[2] == pytest.approx(expected.count(2) / 40)
    assert len(vector) == 16


def test_a_draft_that_only_looks_up_is_asked_step_by_step(common: ModuleType) -> None:
    text = common.Text("caption", 0, [5, 6, 5], [6, 9, 5, 6, 9], [1.0] * 5)
    ranks = common.record_guesses(LookupDraft(VOCABULARY), text).ranks(text)
    # after 5 came 6; after 6 came 5, not 9; after 9 nothing yet; after 5 came 6; after (5, 6) came 5, then 9
    assert ranks.tolist()[0] == 0
    assert ranks.tolist()[2] == common.KEPT
    assert ranks.tolist()[3] == 0
    assert ranks.tolist()[4] < 2


def test_texts_may_differ_at_ties_only(common: ModuleType) -> None:
    text = common.Text("caption", 0, [1], [5, 6, 7, 8], [1.0, 5e-4, 1.0, 1.0])
    assert common.compare_texts(text, [5, 6, 7, 8]) is None
    tie, other = common.compare_texts(text, [5, 9, 7, 8]), common.compare_texts(text, [5, 6, 0, 8])
    short = common.compare_texts(text, [5, 6])
    assert common.compare_texts(text, [5, 6], whole=False) is None
    assert common.judge_texts([None, tie], "all")["holds"] is True
    assert "1 leave it at a tie" in common.judge_texts([None, tie], "all")["detail"]
    assert common.judge_texts([None, tie, other], "all")["holds"] is False
    assert common.judge_texts([short], "all")["holds"] is False


def test_a_folder_takes_more_drafts_but_no_other_ones(common: ModuleType, tmp_path: Path) -> None:
    common.check_identity(tmp_path, {"model": "a", "drafts": {"student": "1"}})
    common.check_identity(tmp_path, {"model": "a", "drafts": {"lookup": "2"}})
    common.check_identity(tmp_path, {"model": "a", "drafts": {"lookup": "2", "student": "1"}})
    for other in ({"model": "b", "drafts": {}}, {"model": "a", "drafts": {"student": "2"}}, {"drafts": {}}):
        with pytest.raises(common.UserError, match="another model or other settings"):
            common.check_identity(tmp_path, other)


def made_up(speculation: ModuleType, tree: int, chain: int, assisted: int) -> list[bool]:
    """Verdicts where 100 tokens took so many passes of the target."""
    common = sys.modules["language_common"]
    texts = [common.Text("caption", i, [1], [5] * 100, [1.0] * 100) for i in range(12)]

    def results(passes: int, **more: Any) -> dict[int, Any]:
        row = {"tokens": 100, "draft_passes": 9, "seconds": 1.0, **more}
        return {i: row | {"target_passes": passes + i % 2} for i in range(12)}

    found = {
        "replayed/student/best-first/64": results(tree),
        "written/student/best-first/64": results(tree, differs=None),
        "replayed/student/chain/64": results(chain),
        "replayed/copy:4/best-first/64": results(10),
        "assisted/student/default": results(assisted, differs=None),
    }
    options: Any = type("Options", (), {"drafts": ["student", "copy:4"]})
    verdicts = speculation.judge(found, texts, options)
    report = {
        "arms": speculation.compare(found, texts), "drafts": options.drafts, "budgets": [8, 64],
        "acceptance": {"student": {"prompt writing": [0.5] * 16}}, "verdicts": verdicts, "notes": [],
    }  # fmt: skip
    few = {place: row for place, row in found["replayed/student/chain/64"].items() if place < 3}
    report["arms"] |= speculation.compare({"replayed/student/chain/8": few}, texts)
    shown = speculation.table(report)
    assert f"| student | best-first | – | {100 / (tree + 0.5):.2f}" in shown
    assert "; 3) | " in (chains := next(line for line in shown.splitlines() if "| chain |" in line))
    assert chains.endswith("; 12) |")  # each cell tells its own
    assert "upper bound copy:4: 9.52" in shown
    return [verdict["holds"] for verdict in verdicts]


def test_verdicts_on_trees_can_say_yes_and_no(speculation: ModuleType) -> None:
    # texts, replays, 3 tokens a pass, 1.3 times the chain, more than assisted generation
    assert made_up(speculation, 25, 40, 35) == [True] * 5
    assert made_up(speculation, 35, 50, 45) == [True, True, False, True, True]
    assert made_up(speculation, 30, 36, 28) == [True, True, True, False, False]


@pytest.mark.slow
def test_the_trees_are_measured_and_continued(
    speculation: ModuleType, toy_folder: Path, toy_prompts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["--quick", "--model", str(toy_folder), "--prompts", str(toy_prompts)]
    arguments += ["--drafts", "early-exit:2,lookup,copy:4", "--work", str(tmp_path / "work")]
    arguments += ["--json", str(tmp_path / "found.json"), "--assistant-tokens", "8"]
    speculation.main(arguments)
    shown = capsys.readouterr().out
    assert "every text really written is the target's own but for ties under 0.001: **yes**" in shown
    assert "replays count the passes that were really made, to 1 %: **yes**" in shown
    first = json.loads((tmp_path / "found.json").read_text())
    rows = first["arms"]
    assert rows["written/early-exit:2/best-first/64"]["prompt writing"]["prompts"] == 3
    # a chain of 8 and Transformers' assisted generation with 8 guesses are the same
    own, theirs = rows["replayed/early-exit:2/chain/8"], rows["assisted/early-exit:2/8"]
    assert own["prompt writing"]["target_passes"] == theirs["prompt writing"]["target_passes"]
    assert theirs["prompt writing"]["draft_passes"] > theirs["prompt writing"]["target_passes"]
    (tmp_path / "work" / "arms" / "prompt lookup_10.json").unlink()  # as if it had been killed there
    speculation.main(arguments)
    again = json.loads((tmp_path / "found.json").read_text())
    assert again["arms"].keys() == rows.keys()
    written = "written/early-exit:2/chain/64"
    assert again["arms"][written] == rows[written]  # with its seconds
    with pytest.raises(speculation.UserError, match="another model or other settings"):
        speculation.main([*arguments, "--tokens", "20"])


def test_offloaded_weights_are_counted_and_wait_for_the_link(
    common: ModuleType, offload: ModuleType, tmp_path: Path
) -> None:
    target, text = make_toy(), make_text(common, make_toy(), [5, 7, 9], 6)
    layers = sum(each.nbytes for each in target.model.layers.parameters())
    every = sum(each.nbytes for each in target.parameters())
    for whole in (False, True):
        model = make_toy()
        weights = offload.offload(model, tmp_path / "weights", whole)
        assert all(each.is_meta for each in model.model.layers.parameters())
        assert model.lm_head.weight.is_meta == whole
        weights.drops_pages = True
        made = offload.time_transformers(model, lambda weights=weights: weights.bytes_read, text, 3)
        assert made["bytes"] == [every if whole else layers] * 3
        assert made["tokens"] == [1, 1, 1]
        assert made["differs"] is None
        weights.link = offload.Link(layers / 0.05)
        slow = offload.time_transformers(model, lambda weights=weights: weights.bytes_read, text, 3)
        assert min(slow["seconds"]) > 0.045
    assert weights.bytes_read == 8 * every


def test_rounds_of_the_engine_are_timed_one_by_one(common: ModuleType, offload: ModuleType) -> None:
    target = make_toy()
    text = make_text(common, target, [5, 7, 9], 40)
    draft, read = ModelDraft(Decoder(blur(target))), iter(range(0, 1000, 7))
    made = offload.time_engine(Decoder(target), draft, Trees("best-first", 16), lambda: next(read), text, 4)
    assert len(made["seconds"]) == len(made["tokens"]) == 4
    assert made["bytes"] == [7] * 4
    assert sum(made["tokens"]) > 4
    assert made["differs"] is None
    assert made["prefill"] > 0
    wrong = common.Text("caption", 0, text.prompt, [*text.tokens[:2], 0, *text.tokens[3:]], text.gaps)
    found = offload.time_engine(Decoder(target), None, Trees("none"), int, wrong, 4)
    assert found["differs"]["at"] == 2


def made_up_level(offload: ModuleType, tree: float, prefetch: float, level: str = "0.1") -> list[bool]:
    """Verdicts where accelerate takes 1 s a pass and the others so many; a tree yields 4 tokens."""
    size = {"budget": 8, "depth": 4, "expected_tokens": 2.0, "draft_seconds": 0.1, "target_seconds": 0.9}
    seconds = {
        offload.PLAIN: 0.1, offload.ACCELERATE: 1.0, offload.WHOLE: 1.5, offload.UNREAD: 1.0,
        offload.READ: prefetch, offload.TREE: tree, offload.name_size(size): 0.8, offload.LLAMA: 0.05,
    }  # fmt: skip
    kept: dict[str, Any] = {"sizes": [size], "passes": {"ram": [[1, 0.1], [129, 1.0]]}}
    for name, took in seconds.items():
        for turn in range(3):
            kept[f"{turn}/{name}"] = {
                "prefill": 2 * took, "seconds": [took, took * (1 + 0.01 * turn)],
                "tokens": [9, 9], "bytes": [10**8] * 2, "differs": None, "ram_bytes": 10**8 + turn,
            }  # fmt: skip
    yields = {offload.TREE: [[30, 10], [50, 10]]}  # 4 a pass, whatever those of the timed passes were
    found = offload.compare_level(kept, yields, level, 1e9 * float(level))
    tree = found["rows"][offload.TREE]
    assert tree["tokens_a_pass"] == 4.0
    assert tree["tokens_a_pass_interval"] == [3.0, 5.0]
    assert tree["seconds_a_token"]["interval"][0] < tree["seconds_a_pass"] / 4.9
    assert "ram_bytes" not in tree
    assert found["rows"][offload.LLAMA]["ram_bytes"] == 10**8 + 2
    equal = {"file_bytes": 98 * 10**6, "equal": [[10, 15, 20], [30, 30, 30]]}
    told = offload.describe_llama([found], equal, "float32")
    assert "98 MB in 4 bits, and takes 100 MB of RAM" in told
    assert "Of 50 greedy tokens of ours it would write 45 behind the same beginning" in told
    assert "it writes 40 before it first leaves our texts, and 1 of these 2 to their end" in told
    assert "is missing" in offload.describe_llama([found], None, "float32")
    (row,) = found["predictions"]
    assert row["predicted"] == pytest.approx(0.5)
    assert row["measured"] == pytest.approx(0.8, rel=0.01)
    assert row["error_of_tokens"] == pytest.approx(1.0)
    assert found["rows"][offload.READ]["roofline_seconds_a_token"] == pytest.approx(1.0)
    assert found["rows"][offload.READ]["bound_by"] == "link"
    verdicts = offload.judge([found])
    report = {"levels": [found], "verdicts": verdicts, "notes": []}
    assert f"simulated {level} GB/s | {offload.LLAMA} | 0.05" in offload.table(report)
    return [verdict["holds"] for verdict in verdicts]


def test_verdicts_on_slow_memory_can_say_yes_and_no(offload: ModuleType) -> None:
    # texts, tree faster than accelerate by 0.8 times its tokens, prefetch no slower
    assert made_up_level(offload, 1.1, 0.9) == [True, True, True]
    assert made_up_level(offload, 1.4, 1.1) == [True, False, False]


def test_a_fast_link_asks_nothing_of_trees(offload: ModuleType) -> None:
    row: Any = {"prefill": 1.0, "seconds": [1.0, 1.0], "tokens": [1, 1], "bytes": [1e8] * 2, "differs": None}
    kept = {f"0/{name}": row for name in (offload.ACCELERATE, offload.READ, offload.TREE)}
    fast = offload.compare_level(kept | {"passes": {"ram": [[1, 0.1], [129, 1.0]]}}, {}, "2", 2e9)
    assert fast["rows"][offload.READ]["bound_by"] == "compute"
    assert [verdict["holds"] for verdict in offload.judge([fast])] == [True, True]
    text = offload.describe_crossover([fast], 10**8)
    assert "1 tokens from 1.00 GB/s, 129 tokens from 0.10 GB/s" in text


def test_llama_writes_and_is_timed_and_its_file_is_in_its_memory(offload: ModuleType) -> None:
    yardstick = sys.modules["llama_yardstick"]
    path = yardstick.find_packaged_file()
    with yardstick.Llama(path, 1) as llama:
        process = llama._process
        prompt = [504, 3575, 282, 4649, 314]  # "The capital of France is"
        turn = offload.time_llama(llama, SimpleNamespace(prompt=prompt), 3)
        assert len(turn["seconds"]) == len(turn["bytes"]) == len(turn["tokens"]) == 3
        assert 0 < min(turn["seconds"]) < 10
        assert 0.5 * path.stat().st_size < turn["ram_bytes"] < 4 * path.stat().st_size
        made = llama.write(prompt, 8)
        assert made == llama.write(prompt, 8)
        other = [(token + 1) % 49152 for token in made[5:]]
        texts = [
            SimpleNamespace(prompt=prompt, tokens=tokens, gaps=[1.0] * 8)
            for tokens in (made, [*made[:5], *other], [*made[:7], 2])  # 2 ends a text
        ]
        equal = offload.compare_llama(llama, texts)
        assert [each[0] for each in equal] == [8, 5, 7]
        assert equal[0][1] == 8
        assert all(5 <= agreed < 8 for _, agreed, _ in equal[1:])
        with pytest.raises(RuntimeError, match="ended with code"):
            llama.write([-1], 8)
    assert process.poll() is not None


@pytest.mark.slow
def test_slow_memory_is_measured_and_continued(
    offload: ModuleType, toy_folder: Path, toy_prompts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["--quick", "--model", str(toy_folder), "--prompts", str(toy_prompts)]
    arguments += ["--draft", "early-exit:2", "--work", str(tmp_path / "work"), "--levels", "disk,0.002"]
    arguments += ["--json", str(tmp_path / "found.json")]
    offload.main(arguments)
    shown = capsys.readouterr().out
    assert "all write the same text but for ties under 0.001: **yes**" in shown
    found = json.loads((tmp_path / "found.json").read_text())
    slow = found["levels"][1]
    per_token = {name: row["bytes_a_token"] for name, row in slow["rows"].items()}
    assert per_token[offload.PLAIN] == 0
    assert per_token[offload.ACCELERATE] == per_token[offload.UNREAD] == per_token[offload.READ]
    assert per_token[offload.WHOLE] > per_token[offload.READ] > per_token[offload.TREE]
    for name in (offload.ACCELERATE, offload.UNREAD):
        least = slow["rows"][name]["roofline_seconds_a_token"]
        assert slow["rows"][name]["seconds_a_token"]["value"] > 0.99 * least
    assert len(slow["predictions"]) >= 2
    assert "llama.cpp is not here" in shown  # for a toy there is no file
    counted = json.loads((tmp_path / "work" / "yields.json").read_text())
    names = {name for level in found["levels"] for name in level["rows"]}
    assert counted.keys() == {name for name in names if "tree" in name or "optimal" in name}
    assert all(len(each) == 6 for each in counted.values())  # two prompts of each of three tasks
    kept = tmp_path / "work" / "level_0.002.json"
    before = json.loads(kept.read_text())
    killed = {key: value for key, value in before.items() if not key.startswith("1/")}
    kept.write_text(json.dumps(killed))
    offload.main(arguments)
    after = json.loads(kept.read_text())
    assert after.keys() == before.keys()
    assert all(after[key] == value for key, value in killed.items())
    with pytest.raises(offload.UserError, match="another model or other settings"):
        offload.main([*arguments, "--draft", "lookup"])


def test_greedy_identity_is_checked_in_every_memory_and_continued(
    identity: ModuleType, toy_folder: Path, toy_prompts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["--model", str(toy_folder), "--prompts", str(toy_prompts), "--per-task", "2"]
    arguments += ["--drafts", "early-exit:2,lookup", "--work", str(tmp_path), "--tokens", "12"]
    arguments += ["--json", str(tmp_path / "found.json"), "--batch", "3", "--budget", "6"]
    identity.main(arguments)
    assert "greedy text of 18 kinds of trees, drafts and memory is the target's own but" in (
        shown := capsys.readouterr().out
    )
    assert "**yes** (144 texts, 144 equal token for token" in shown
    texts = json.loads((tmp_path / "texts.json").read_text())
    texts["3"]["tokens"][5] = (texts["3"]["tokens"][5] + 1) % VOCABULARY  # as if the target had written it
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    cells = json.loads((tmp_path / "cells.json").read_text())
    kept = {name: cell for name, cell in cells.items() if name != "half streamed/lookup/chain"}
    (tmp_path / "cells.json").write_text(json.dumps(kept))
    identity.main(arguments)
    assert "**no** (144 texts, 143 equal token for token" in capsys.readouterr().out

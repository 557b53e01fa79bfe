"""`llm generate --throughput`: a file of prompts becomes a file of texts, whatever happens on the way."""

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from language_toys import make_toy, save_toy
from throughput_runs import HALF, NEW, PLACEMENT, die_in_a_line, run, write_slowly
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.errors import UserError
from t2iprobe.llm.commands import load_engine, write_texts
from t2iprobe.llm.engine.generation import Trees
from t2iprobe.llm.engine.processing import Sampling
from t2iprobe.llm.memory.placement import Placement, Shares
from t2iprobe.llm.throughput import Block

WORDS = ("a heron", "tea", "the old lighthouse", "b", "seven cups", "a dog in the rain", "zebra", "ink")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("target") / "toy", make_toy(layers=4))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": text, "id": number} for number, text in enumerate(WORDS * 5)]
    rows[3] = {"messages": [{"role": "user", "content": "hi"}]}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def write_plainly(target: Path, prompts: Path, sampling: Sampling | None = None, **more: Any) -> list[Any]:
    with load_engine(str(target), "none", dtype="float64") as engine:
        made = write_texts(
            engine, read(prompts), sampling=sampling, trees=Trees("none"), max_new_tokens=NEW, **more
        )
        return [{key: each[key] for key in ("token_ids", "text", "stop_reason")} for each in made]


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.3, top_p=0.95, seed=4)])
def test_the_texts_are_those_of_generate_in_order(
    target: Path, prompts: Path, tmp_path: Path, sampling: Sampling | None
) -> None:
    seen: list[tuple[int, int]] = []
    found = run(
        prompts,
        tmp_path / "out.jsonl",
        target,
        sampling=sampling,
        show=lambda *at: seen.append(at),
        stop=["q"],
    )
    lines = read(tmp_path / "out.jsonl")
    assert [line["index"] for line in lines] == list(range(40))
    assert [line.get("id") for line in lines] == [row.get("id") for row in read(prompts)]
    assert lines[3]["messages"] == [{"role": "user", "content": "hi"}]
    made = [{key: line[key] for key in ("token_ids", "text", "stop_reason")} for line in lines]
    assert made == write_plainly(target, prompts, sampling, stop=["q"])
    assert len({line["stop_reason"] for line in lines}) > 1
    assert seen[0] == (0, 40)
    assert seen[-1] == (40, 40)
    assert len(seen) > 2
    # The noise is the prompt's own: not the same for all.
    if sampling is not None:
        same = [line["text"] for line in lines if line.get("prompt") == WORDS[0]]
        assert len(set(same)) > 1
    assert found["tokens"] == sum(len(line["token_ids"]) for line in lines)


def test_what_was_done_is_told(target: Path, prompts: Path, tmp_path: Path) -> None:
    found = run(prompts, tmp_path / "out.jsonl", target, memory=600_000)
    layer = sum(parameter.nbytes for parameter in make_toy(layers=1).model.layers.parameters())
    assert found["written"] == found["prompts"] == 40
    assert found["placement"]["asked"]["weights"] == {"device": 0.5, "ram": 0, "disk": 0.5}
    assert found["placement"]["realised"] == {name: {"device": 0.5, "ram": 0, "disk": 0.5} for name in (
        "weights", "cache", "hidden")}  # fmt: skip
    assert found["layer_loads"] == 2 * found["passes"]
    used = found["layer_loads"] * layer
    assert used <= found["weight_bytes_read"] <= used + 2 * layer  # and what was read ahead at the end
    assert found["weight_bytes_per_token"] == found["weight_bytes_read"] / found["tokens"]
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])
    assert 0 < found["peak_bytes"]["device"] <= found["budget_bytes"] == 600_000
    assert json.loads(json.dumps(found)) == found


def test_too_little_memory_is_refused(target: Path, prompts: Path, tmp_path: Path) -> None:
    whole = Placement(2, 2, Shares(1, 0, 0), Shares(1, 0, 0), Shares(1, 0, 0))
    with pytest.raises(UserError, match="layers that stay needs .* bytes and the device budget of 100000"):
        run(prompts, tmp_path / "out.jsonl", target, memory=100_000, block=whole)
    assert read(tmp_path / "out.jsonl") == []
    for values, match in (
        ((0,), "a batch has 1"),
        ((1, 0), "a block has 1"),
        ((1, 1, 3), "in 4 bits, not in 3"),
    ):
        with pytest.raises(UserError, match=match):
            Block(*values)


@pytest.mark.parametrize(
    "weights", [Shares(0, 0, 1), Shares(0.5, 0, 0.5), Shares(0.25, 0.25, 0.5), Shares(1, 0, 0)]
)
def test_one_placement_drives_blocks_and_a_speculative_target(
    target: Path, prompts: Path, tmp_path: Path, weights: Shares
) -> None:
    placement = Placement(2, 2, weights, HALF, HALF)
    run(prompts, tmp_path / "out.jsonl", target, block=placement)
    expected = [line["token_ids"] for line in read(tmp_path / "out.jsonl")][:6]
    layer = sum(parameter.nbytes for parameter in make_toy(layers=1).model.layers.parameters())
    with load_engine(str(target), "early-exit:2", dtype="float64", placement=placement) as engine:
        assert engine.placement is placement
        assert engine.store is not None
        assert len(engine.store.resident) == int(4 * weights.device)
        made = write_texts(
            engine, read(prompts)[:6], trees=Trees("best-first", 6), max_new_tokens=NEW, batch=2
        )
        assert [each["token_ids"] for each in made] == expected
        assert engine.store.counters.bytes_used == engine.store.counters.passes * 4 * weights.disk * layer
    with pytest.raises(UserError, match="layers that stay needs"):
        load_engine(str(target), "none", dtype="float64", memory=30_000, placement=PLACEMENT)
    with load_engine(str(target), "none", dtype="float64", memory=230_000) as chosen:
        assert chosen.placement is not None
        assert 0 < chosen.placement.weights.device < 1
        assert len(chosen.store.resident) == round(4 * chosen.placement.weights.device)  # type: ignore[union-attr]


def test_in_few_bits_the_target_is_that_of_the_blocks(target: Path, prompts: Path, tmp_path: Path) -> None:
    placement = Placement(2, 2, HALF, Shares(1, 0, 0), Shares(1, 0, 0), weight_bits=4)
    run(prompts, tmp_path / "out.jsonl", target, block=placement)
    with load_engine(str(target), "lookup", dtype="float64", placement=placement) as engine:
        made = write_texts(engine, read(prompts)[:6], trees=Trees("chain", 3), max_new_tokens=NEW)
        assert [each["token_ids"] for each in made] == [
            line["token_ids"] for line in read(tmp_path / "out.jsonl")[:6]
        ]


def test_a_run_that_ended_is_continued(target: Path, prompts: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(prompts, whole, target)
    content = whole.read_bytes()
    sampled = {"sampling": Sampling(temperature=0.9, seed=1)}
    for cut in (0, 7, len(content) // 2, content.rfind(b"\n", 0, -1) + 1, len(content) - 1):
        out.write_bytes(content[:cut])
        (tmp_path / "out.jsonl.settings.json").write_bytes(
            (tmp_path / "whole.jsonl.settings.json").read_bytes()
        )
        before = content[:cut].count(b"\n")
        # The shape of the blocks may be another.
        found = run(prompts, out, target, block=Placement(3, 1, HALF, HALF, HALF))
        assert (found["done_before"], found["written"]) == (before, 40 - before)
        assert out.read_bytes() == content
    found = run(prompts, out, target)
    assert found == {"out": str(out), "prompts": 40, "done_before": 40, "written": 0}
    other = tmp_path / "sampled.jsonl"
    run(prompts, other, target, **sampled)
    drawn = other.read_bytes()
    assert drawn != content
    other.write_bytes(drawn[: len(drawn) // 3])
    run(prompts, other, target, **sampled)
    assert other.read_bytes() == drawn  # a continued prompt has its own noise, too


def test_a_file_of_something_else_is_refused(
    target: Path, prompts: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path / "out.jsonl"
    run(prompts, out, target)
    content = out.read_bytes()
    other = save_toy(tmp_path_factory.mktemp("other") / "toy", make_toy(layers=4, seed=1))
    for more, match in (
        ({"max_new_tokens": 3}, "another max new tokens"),
        ({"sampling": Sampling(seed=1)}, "another sampling"),
        ({"block": Placement(2, 2, HALF, HALF, HALF, cache_bits=4)}, "another bits"),
        ({"raw": True}, "another raw"),
    ):
        with pytest.raises(UserError, match=match):
            run(prompts, out, target, **more)
    with pytest.raises(UserError, match="another model"):
        run(prompts, out, other)
    with open(prompts, "a") as file:
        file.write('{"prompt": "more"}\n')
    with pytest.raises(UserError, match="another prompts"):
        run(prompts, out, target)
    assert out.read_bytes() == content
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine\n")
    with pytest.raises(UserError, match=r"is there and notes.txt.settings.json is not"):
        run(prompts, foreign, target)
    assert foreign.read_text() == "mine\n"
    swapped = content.splitlines(keepends=True)
    swapped[0], swapped[1] = swapped[1], swapped[0]
    out.write_bytes(b"".join(swapped))
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="line 1 is damaged"):
        run(prompts, out, target)


def test_one_process_writes_a_file(target: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with open(out, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process writes"):
            run(prompts, out, target)


def test_killed_and_continued_nothing_is_lost_or_doubled(target: Path, prompts: Path, tmp_path: Path) -> None:
    rows = prompts.read_text() * 4
    prompts.write_text(rows)
    whole, out, disk = tmp_path / "whole.jsonl", tmp_path / "out.jsonl", Path(os.environ["XDG_CACHE_HOME"])
    run(prompts, whole, target)
    context = multiprocessing.get_context("spawn")
    kept = -1
    for _ in range(2):
        process = context.Process(target=write_slowly, args=(prompts, out, target))
        process.start()
        deadline = time.monotonic() + 120
        size = out.stat().st_size if out.exists() else 0
        while not (out.exists() and out.stat().st_size > size) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert kept < len(read(out)) < 160
        kept = len(read(out))
    found = run(prompts, out, target)
    assert found["done_before"] == kept
    assert out.read_bytes() == whole.read_bytes()
    assert list((disk / "t2iprobe" / "blocks").iterdir()) == []  # the killed ones' caches are gone, too


def test_killed_in_a_line_the_command_continues_behind_the_last_whole_one(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(prompts, whole, target)
    process = multiprocessing.get_context("spawn").Process(target=die_in_a_line, args=(prompts, out, target))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    torn = out.read_bytes()
    assert whole.read_bytes().startswith(torn)
    assert not torn.endswith(b"\n")
    words = ["llm", "generate", "--prompts", str(prompts), "--throughput", "--model", str(target)]
    words += ["--out", str(out), "--max-new-tokens", str(NEW), "--dtype", "float64", "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "--batch", "3", "--block", "1", "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert (found["done_before"], found["written"]) == (torn.count(b"\n"), 40 - torn.count(b"\n"))
    assert 0 < found["done_before"] < 40
    assert out.read_bytes() == whole.read_bytes()


def test_the_command_says_what_it_lacks(target: Path, prompts: Path, tmp_path: Path) -> None:
    words = ["llm", "generate", "--prompts", str(prompts), "--model", str(target)]
    out = ["--out", str(tmp_path / "out.jsonl")]
    alone = CliRunner().invoke(app, ["llm", "generate", "a heron", "--throughput", *out])
    assert "give --prompts FILE" in str(alone.exception)
    for more, match in (
        (["--throughput", *out, "--draft", "lookup"], "without a draft"),
        (["--throughput", *out, "--bits", "3"], "in 4 bits, not in 3"),
        (["--throughput", *out, "--block", "0"], "a block has 1 or more"),
        (["--block", "2"], "--block is of --throughput"),
        (out, "--out is of --throughput"),
    ):
        result = CliRunner().invoke(app, [*words, *more])
        assert result.exit_code != 0
        assert match in str(result.exception)


def test_the_command_plans_and_writes(target: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ["llm", "generate", "--prompts", str(prompts), "--throughput", "--model", str(target)]
    words += ["--out", str(out), "--memory", "700kB", "--block", "3", "--max-new-tokens", str(NEW)]
    words += ["--dtype", "float64"]
    words += ["--disk", str(tmp_path / "disk"), "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert found["placement"]["batches"] == 3
    assert found["predicted_tokens_per_second"] > 0
    assert found["peak_bytes"]["device"] <= 700_000  # what the planner chose fits
    assert [line["token_ids"] for line in read(out)] == [
        made["token_ids"] for made in write_plainly(target, prompts)
    ]
    told = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "told.jsonl")]).stdout
    for name, shares in found["placement"]["realised"].items():
        (line,) = (line for line in told.splitlines() if line.strip().startswith(name))
        assert line.split()[1:4] == [f"{shares[tier]:.1%}" for tier in ("device", "ram", "disk")]
    again = CliRunner().invoke(app, words)
    assert again.stdout.strip() == f"{out} was done before: 40 texts"
    other = ["--memory", "1kB", "--out", str(tmp_path / "other.jsonl")]
    beside = CliRunner().invoke(app, [word for word in words if word not in ("--out", str(out))])
    assert f"→ {prompts.with_suffix('.texts.jsonl')}" in beside.stdout
    assert read(prompts.with_suffix(".texts.jsonl")) == read(out)
    smaller = CliRunner().invoke(app, [*words, *other])
    assert "embedding, last norm and head needs" in str(smaller.exception)


@pytest.mark.slow
def test_the_process_grows_less_than_the_budget(tmp_path: Path, prompts: Path) -> None:
    """Resident memory, as the system counts it, with a model of 20 MB layers under a third of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    folder = save_toy(tmp_path / "model", LlamaForCausalLM(config))
    code = f"""
import threading, time
from pathlib import Path
from t2iprobe.llm.memory.placement import Placement, Shares
from t2iprobe.llm.throughput import write_file
import t2iprobe.llm.throughput as throughput
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
half = Shares(0.25, 0, 0.75)
def run(out, block, new):
    return write_file(Path({str(prompts)!r}), Path({str(tmp_path)!r}, out), model={str(folder)!r},
                      block=block, memory=BUDGET, max_new_tokens=new)
BUDGET = 72_000_000
import torch
torch.set_num_threads(1)
before, peak, on = [0], [0], [True]
load = throughput.load_without_layers
def start(*a, **k):
    before[0] = resident()
    return load(*a, **k)
throughput.load_without_layers = start
run("warm.jsonl", Placement(1, 1, Shares(0, 0, 1), Shares(1, 0, 0), Shares(1, 0, 0)), 2)
def watch():
    while on[0]:
        peak[0] = max(peak[0], resident())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
found = run("out.jsonl", Placement(4, 4, Shares(0.1, 0, 0.9), half, half), 40)
on[0] = False; thread.join()
print(peak[0] - before[0], found["peak_bytes"]["device"], found["budget_bytes"])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert result.returncode == 0, result.stderr[-2000:]
    grown, taken, budget = map(int, result.stdout.split()[-3:])
    assert taken <= budget
    assert grown <= budget, (grown, taken, budget)

"""The commands, as real processes: join, status, generate, tune."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from real_command import Started, call, start
from swarm_toys import wait_until

from t2iprobe.llm.swarm.joining import parse_blocks

pytest.importorskip("hivemind")

DOCS = Path(__file__).parents[3] / "docs" / "swarm.md"
OPTIONS = ("--dtype", "float64", "--device", "cpu", "--json")
QUICK = ("--period", "5")  # a record that is not renewed for three of them is gone


def lines(started: Started) -> list[str]:
    out = Path(started._output.name, "out")
    return out.read_text().splitlines() if out.exists() else []


@contextmanager
def joined(words: list[str], cache: Path) -> Iterator[tuple[Started, str]]:
    """A server by command, and the address that it prints first."""
    started = start(*words, *QUICK, *OPTIONS, environment={"XDG_CACHE_HOME": str(cache)})
    try:
        wait_until(lambda: lines(started) or not started._process.is_alive(), 120)
        assert started._process.is_alive(), started.wait()
        yield started, lines(started)[0]
    finally:
        if started._process.is_alive():
            os.kill(started._process.pid, signal.SIGTERM)
            done = started.wait()
            assert done.code == 0, done
            assert done.err == ""


def test_what_the_docs_show_works(toy, packed_cache, tmp_path):
    """Every command of docs/swarm.md, with a toy for the model: join, join, generate, tune, generate."""
    commands = re.findall(r"^t2iprobe (.*?)(?: &)?$", DOCS.read_text(), re.MULTILINE)
    assert [command.split()[:3][-1] for command in commands] == [
        "join", "join", commands[2].split()[2], "tune", commands[4].split()[2],
    ]  # fmt: skip
    environment = {"XDG_CACHE_HOME": str(packed_cache)}
    examples, soft = tmp_path / "captions.jsonl", tmp_path / "style.safetensors"
    examples.write_text('{"text": "abc."}\n' * 4)

    def words(number: int, address: str = "") -> list[str]:
        instead = {"smollm2": toy, "0:15": "0:4", "15:30": "4:6", "ADDRESS": address}
        instead |= {"captions.jsonl": examples, "style.safetensors": soft}
        return [str(instead.get(word, word)) for word in shlex.split(commands[number])]

    def run(number: int, address: str, *more: object):
        done = call(*words(number, address), "--model", toy, *more, *OPTIONS, environment=environment)
        return json.loads(done.out)

    with joined(words(0), packed_cache) as (one, address):
        assert address.startswith("/ip4/127.0.0.1/tcp/")
        wait_until(lambda: status(address)["holes"] == [4, 5], 120)
        about = json.loads("\n".join(lines(one)[1:]))
        assert (about["blocks"], about["of"], about["address"]) == ([0, 4], 6, address)
        with joined([*words(1, address), "--memory", "100kB"], packed_cache) as (two, other):
            about = json.loads("\n".join(lines(two)[1:]))
            assert about["resident_peak_bytes"] <= 100_000
            assert about["weights"]["disk"] > 0
            wait_until(lambda: len(status(address)["servers"]) == 2, 120)
            found = status(other)
            assert found["holes"] == []
            spans = [(each["first"], each["last"]) for each in found["servers"]]
            assert spans == [(0, 4), (4, 6)]
            table = call("llm", "swarm", "status", "--peer", address).out
            assert "0:4" in table
            assert "online" in table
            short = ("--max-new-tokens", 8)
            here = words(2)[: words(2).index("--swarm")]
            alone = call(*here, "--model", toy, "--draft", "none", *short, *OPTIONS, environment=environment)
            made = run(2, other, *short)
            assert made["token_ids"] == json.loads(alone.out)["token_ids"]
            assert made["round_trips"] == 2 * made["target_passes"]
            assert (made["replayed_tokens"], made["reroutes"]) == (0, 0)
            tuned = run(3, address, "--epochs", 2, "--rows", 2, "--rank", 1)
            assert (tuned["rank"], tuned["borders"]) == (1, [0, 4])
            assert tuned["held_out_loss_after"] < tuned["held_out_loss_before"]
            assert len(run(4, address, "--eight-bits", *short)["token_ids"]) <= 8
        # The one that was ended has told so.
        wait_until(lambda: status(address)["holes"] == [4, 5], 120)


def status(address: str):
    (found,) = json.loads(call("llm", "swarm", "status", "--peer", address, "--json").out)["models"]
    return found


@pytest.mark.slow
def test_ctrl_c_ends_a_server_and_its_daemon_without_a_word(toy, packed_cache):
    command = [sys.executable, "-m", "t2iprobe", "llm", "swarm", "join", str(toy), *OPTIONS]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"XDG_CACHE_HOME": str(packed_cache)},
    )  # fmt: skip
    assert process.stdout.readline().startswith("/ip4/127.0.0.1/tcp/")
    assert len(living(process.pid)) == 2  # the server and its daemon
    os.killpg(process.pid, signal.SIGINT)  # a terminal tells the whole group
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    # What has ended and waits for whoever began it does not count.
    wait_until(lambda: not living(process.pid))


def living(group: int) -> list[str]:
    """The processes of a group that have not ended, as /proc tells of them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = stat.read_text()
            state, _, own = text.rpartition(")")[2].split()[:3]
            if int(own) == group and state not in "ZX":
                found.append(text)
    return found


@pytest.mark.slow
def test_a_server_that_is_free_moves_to_the_blocks_that_are_left(servers):
    held = {(0, 3): servers.start("0:3")}
    first = held[0, 3]
    held[3, 6] = servers.start("3:6", first.address)
    free = servers.start("3", first.address)
    from t2iprobe.llm.swarm.status import read_status

    def spans() -> dict[str, tuple[int, int]]:
        models = read_status([free.address])["models"]  # none where a busy machine's records come late
        found = [each for model in models for each in model["servers"]]
        return {each["peer"]: (each["first"], each["last"]) for each in found}

    wait_until(lambda: len(spans()) == 3)
    begin = spans()[free.peer]
    (lost,) = set(held) - {begin}
    held[lost].send(signal.SIGKILL)
    wait_until(lambda: free.peer in (now := spans()) and now[free.peer] != begin, 120)
    wait_until(lambda: held[lost].peer not in spans(), 120)
    assert spans() == {held[begin].peer: begin, free.peer: lost}


def test_blocks_are_written_as_a_span_or_a_number():
    from t2iprobe.errors import UserError

    assert parse_blocks("2:5", 6) == (2, 3)
    assert parse_blocks("4", 6) == (None, 4)
    assert parse_blocks(None, 6) == (0, 6)
    for text in ("5:2", "0:7", "-1:2", "7", "0", "a:b", ":", ""):
        with pytest.raises(UserError, match="has blocks 0:6"):
            parse_blocks(text, 6)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("llm", "swarm", "join", "TOY", "--blocks", "4:9"), "has blocks 0:6"),
        (("llm", "swarm", "join", "nowhere"), "there is no language model"),
        (("llm", "swarm", "join", "TOY", "--memory", "9kB"), "9000 bytes of memory are too few"),
        (("llm", "swarm", "join", "TOY", "--bits", "5"), "held in 5 bits: choose 2, 3, 4 or 8"),
        (("llm", "swarm", "status", "--peer", "nonsense"), "cannot join the swarm at nonsense"),
        (("llm", "swarm", "tune", "x", "--out", "y", "--borders", "a"), "are numbers of blocks"),
        (("llm", "generate", "a", "--model", "TOY", "--soft-prompt", "x"), "are of --swarm"),
        (("llm", "generate", "a", "--swarm", "x", "--memory", "1MB"), "a swarm holds the weights"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_in_one_line(toy, packed_cache, words, reason):
    words = [str(toy) if word == "TOY" else word for word in words]
    done = call(*words, code=2, environment={"XDG_CACHE_HOME": str(packed_cache)})
    assert reason in done.err

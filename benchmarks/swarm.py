"""A model served by several machines: round trips, delays, 8 bits, failures; and a simulated large swarm.

    python benchmarks/swarm.py [--work DIR] [--json FILE] [--parts network,failure,simulation]
    python benchmarks/swarm.py --show              # the tables of what has been measured so far

Servers are processes of their own on the loopback. A delay is slept by the client, half before each question
and half before its answer. All contestants of a row write the same greedy text after the same prompts. What
is measured is kept in the work folder, and continued.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from language_common import OTHER_TASKS, PROMPTS, Kept, check_identity, choose_rows, list_verdicts, tell

from t2iprobe.llm.commands import encode_prompt, known_acceptance
from t2iprobe.llm.engine.generation import Trees, generate
from t2iprobe.llm.models import DEFAULT_MODEL, find_language_model
from t2iprobe.llm.swarm.balancing import Placed, block_throughputs, choose_first, decide_move
from t2iprobe.llm.swarm.client import load_swarm_engine
from t2iprobe.llm.swarm.routing import MissingBlocks, Offer, find_route, route_seconds
from t2iprobe.llm.swarm.session import Counters, Settings

BLOCKS = 30  # of the packaged model
TREE = 64
SIZES, LIVES = (20, 100, 200), (0.5, 4.0)  # of simulated swarms: servers, hours that one stays
LEAST_RATIO = 3.0  # fewer round trips a token with trees


# -- real servers --------------------------------------------------------------------------------------


@contextmanager
def running(model: str, spans: Sequence[str]) -> Iterator[list[tuple[subprocess.Popen[str], str]]]:
    """Run one server for each span; yield process and address of each."""
    started: list[subprocess.Popen[str]] = []

    def start(span: str, *more: str) -> subprocess.Popen[str]:
        words = ["llm", "swarm", "join", model, "--blocks", span, "--device", "cpu", "--period", "2", *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "t2iprobe", *words], stdout=subprocess.PIPE, text=True, env=environment
            )
        )
        return started[-1]

    def address(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        if not (line := process.stdout.readline().strip()):
            raise RuntimeError("a server does not come up")
        return line

    try:
        first = address(start(spans[0]))
        for span in spans[1:]:
            start(span, "--peer", first)
        yield [(started[0], first), *((process, address(process)) for process in started[1:])]
    finally:
        for process in started:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in started:
            process.wait(30)


def cut(blocks: int, parts: int) -> list[str]:
    """Return spans of about the same size."""
    borders = [part * blocks // parts for part in range(parts + 1)]
    return [f"{first}:{last}" for first, last in itertools.pairwise(borders)]


def write(engine: Any, prompts: Sequence[Any], tokens: int, trees: Trees, **how: Any) -> dict[str, Any]:
    """Write after each prompt; return the tokens, seconds and what went over the network."""
    engine.target.swarm.counters = Counters()
    draft = None if trees.growth == "none" else engine.draft
    texts, seconds = [], 0.0
    for prompt in prompts:
        began = time.perf_counter()
        (made,) = generate(engine.target, draft, [prompt], max_new_tokens=tokens, trees=trees, **how)
        seconds += time.perf_counter() - began
        texts.append(made.token_ids)
    counted = engine.target.swarm.counters
    count = sum(map(len, texts))
    return {
        "texts": texts,
        "tokens": count,
        "seconds_per_token": seconds / count,
        "round_trips_per_token": counted.round_trips / count,
        "bytes_per_token": (counted.sent_bytes + counted.received_bytes) / count,
        "replayed_tokens": counted.replayed_tokens,
        "reroutes": counted.reroutes,
        "recovery_seconds": counted.recovery_seconds,
        "seconds": seconds,
    }


def measure_network(
    kept: Kept, model: str, rows: Sequence[Any], tokens: int, delays: Sequence[float]
) -> None:
    """Measure 1 to 3 servers, each delay, with and without trees, with and without 8 bits."""
    for parts in (1, 2, 3):
        cells = [
            (f"network/{parts}/{delay:g}/{tree}/{bits}", delay, tree, bits)
            for delay in delays
            for tree in ("none", "tree")
            for bits in ("full", "8")
        ]
        if all(key in kept for key, *_ in cells):
            continue
        with running(model, cut(BLOCKS, parts)) as servers:
            for bits in ("full", "8"):
                settings = Settings(eight_bits=bits == "8", stall_seconds=20.0)
                with load_swarm_engine(model, [servers[0][1]], settings=settings) as engine:
                    prompts = [encode_prompt(engine, row) for _, row in rows]
                    write(engine, prompts[:1], 4, Trees("none"))  # warms up
                    for key, delay, tree, own in cells:
                        if own != bits or key in kept:
                            continue
                        tell(f"{parts} servers, {delay * 1e3:g} ms, {tree}, {bits} bits")
                        engine.target.swarm.settings = replace(settings, delay_seconds=delay)
                        acceptance = known_acceptance(engine.draft_name)
                        trees = (
                            Trees("none")
                            if tree == "none"
                            else Trees("best-first", TREE, acceptance=acceptance)
                        )
                        kept.put(key, write(engine, prompts, tokens, trees))


def measure_failure(kept: Kept, model: str, rows: Sequence[Any], tokens: int) -> None:
    """Kill or stop a server in mid-text: go on from there, or begin again as one without replay has to."""
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for share in (0.25, 0.5, 0.9):
            key = f"failure/{number.name}/{share:g}"
            if key in kept:
                continue
            tell(f"{number.name} after {share:.0%} of the text")
            spans = [*cut(BLOCKS, 2), f"{BLOCKS // 2}:{BLOCKS}"]
            with running(model, ["0:1", *spans]) as servers:
                settings = Settings(stall_seconds=5.0, ban_seconds=60.0, delay_seconds=0.05)
                with load_swarm_engine(model, [servers[0][1]], "none", settings=settings) as engine:
                    prompt = encode_prompt(engine, rows[0][1])
                    plain = write(engine, [prompt], tokens, Trees("none"))
                    found = _write_while_one_fails(engine, prompt, tokens, servers, number, share)
                    # Who begins again loses what was written, and the time until it is noticed.
                    again = found["seconds_before"] + found["noticed_seconds"] + plain["seconds"]
                    kept.put(key, found | {"plain_seconds": plain["seconds"], "restart_seconds": again,
                                           "same": found["texts"] == plain["texts"]})  # fmt: skip


def _write_while_one_fails(
    engine: Any, prompt: Any, tokens: int, servers: Any, number: signal.Signals, share: float
) -> dict[str, Any]:
    """Write a text, and send a signal to the server of the last block when a share of it is there."""
    target, caches, seen = engine.target, [], [0]
    make, failed = target.new_cache, target.swarm.failed
    began, at, noticed = time.perf_counter(), [0.0], [0.0]

    def new_cache(*args: Any) -> Any:
        caches.append(make(*args))
        return caches[-1]

    def note(error: Any) -> None:
        noticed[0] = noticed[0] or time.perf_counter()
        failed(error)

    def hit(_: int, new: Sequence[int]) -> None:
        seen[0] += len(new)
        if not at[0] and seen[0] >= share * tokens:
            peer = caches[0]._links[-1].hop.peer
            process = next(process for process, address in servers if address.endswith(peer))
            at[0] = time.perf_counter()
            process.send_signal(number)

    target.new_cache, target.swarm.failed = new_cache, note
    try:
        found = write(engine, [prompt], tokens, Trees("none"), on_tokens=hit)
    finally:
        target.new_cache, target.swarm.failed = make, failed
    return found | {"seconds_before": at[0] - began, "noticed_seconds": max(0.0, noticed[0] - at[0])}


# -- a large swarm, simulated --------------------------------------------------------------------------


MINUTE = 1 / 60


class SimulatedSwarm:
    """Servers that come and go; times are in hours.

    Lives are exponential, and whoever goes is followed, some five minutes later, by another with a new speed
    (lognormal), number of blocks (an eighth to three eighths of the model) and round trip (lognormal, 60 ms).
    Newcomers choose the weakest blocks. Where it `balances`, four servers look each minute whether to move,
    which takes two minutes, in which all but routes count them where they will be. With a `blow`, all servers
    whose spans' middles lie in the middle third go at once after a third of the time, for two hours or so.
    """

    def __init__(self, blocks: int, mean_life: float, balances: bool, blow: float | None, seed: int) -> None:
        self.blocks, self.mean_life, self.balances = blocks, mean_life, balances
        self.rng = np.random.default_rng(seed)
        self.placed: dict[str, Placed] = {}
        self.away: set[str] = set()
        self.rtt: dict[str, float] = {}
        self.events: list[tuple[float, int, str, str]] = []
        self.count = self.moves = 0
        if blow is not None:
            self.push(blow, "blow")

    def push(self, at: float, what: str, peer: str = "") -> None:
        self.count += 1
        heapq.heappush(self.events, (at, self.count, what, peer))

    def arrive(self, now: float) -> None:
        peer = f"p{self.count:06}"
        length = int(self.rng.integers(self.blocks // 8, 3 * self.blocks // 8 + 1))
        speed = float(self.rng.lognormal(np.log(20), 0.7))
        first = choose_first(block_throughputs(list(self.placed.values()), self.blocks), length)
        self.placed[peer] = Placed(peer, first, first + length, speed)
        self.rtt[peer] = float(self.rng.lognormal(np.log(0.06), 0.5))
        self.push(now + self.rng.exponential(self.mean_life), "leave", peer)

    def leave(self, now: float, peer: str, mean_gap: float = 5 * MINUTE) -> None:
        if self.placed.pop(peer, None) is not None:
            self.away.discard(peer)
            self.push(now + self.rng.exponential(mean_gap), "arrive")

    def blow(self, now: float) -> None:
        for peer, server in list(self.placed.items()):
            if self.blocks / 3 <= (server.first + server.last) / 2 < 2 * self.blocks / 3:
                self.leave(now, peer, mean_gap=2.0)

    def balance(self, now: float) -> None:
        for peer in map(str, self.rng.choice(sorted(self.placed), min(4, len(self.placed)), replace=False)):
            first = decide_move(list(self.placed.values()), peer, self.blocks, self.rng)
            if first is not None and peer not in self.away:
                own = self.placed[peer]
                self.placed[peer] = replace(own, first=first, last=first + own.length)
                self.away.add(peer)
                self.push(now + 2 * MINUTE, "back", peer)
                self.moves += 1

    def look(self) -> tuple[float | None, float]:
        """Return the seconds of a pass over the cheapest route, None for none, and the weakest block."""
        here = [server for peer, server in self.placed.items() if peer not in self.away]
        offers = [Offer(each.peer, each.first, each.last, 1 / each.throughput / each.length) for each in here]
        try:
            seconds = route_seconds(find_route(offers, 0, self.blocks, self.rtt), offers, self.rtt)
        except MissingBlocks:
            seconds = None
        return seconds, float(block_throughputs(here, self.blocks).min())

    def run(self, servers: int, hours: float) -> dict[str, float]:
        """Let time pass, and ask every minute for a route."""
        for _ in range(servers):
            self.arrive(0.0)
        self.push(MINUTE, "look")
        found: list[tuple[float | None, float]] = []
        while self.events[0][0] <= hours:
            now, _, what, peer = heapq.heappop(self.events)
            if what == "leave":
                self.leave(now, peer)
            elif what == "arrive":
                self.arrive(now)
            elif what == "back":
                self.away.discard(peer)
            elif what == "blow":
                self.blow(now)
            else:
                self.push(now + MINUTE, "look")
                if self.balances and self.placed:
                    self.balance(now)
                found.append(self.look())
        seconds = [each for each, _ in found if each is not None]
        return {
            "available": len(seconds) / len(found),
            "seconds_per_pass": float(np.median(seconds)) if seconds else float("inf"),
            "weakest_tokens_per_second": float(np.median([weakest for _, weakest in found])),
            "moves_per_server_hour": self.moves / servers / hours,
        }


def measure_simulation(kept: Kept, repeats: int, hours: float) -> None:
    """Simulate swarms of several sizes and lives, in calm and with a blow, with and without moves."""
    for servers, mean_life, blow, balances in itertools.product(SIZES, LIVES, (False, True), (False, True)):
        key = f"simulation/{servers}/{mean_life:g}/{blow}/{balances}"
        if key in kept:
            continue
        tell(f"{servers} servers that live {mean_life:g} h, a blow {blow}, moves {balances}")
        runs = [
            SimulatedSwarm(80, mean_life, balances, hours / 3 if blow else None, seed).run(servers, hours)
            for seed in range(repeats)
        ]
        kept.put(key, {name: [run[name] for run in runs] for name in runs[0]})


# -- tables --------------------------------------------------------------------------------------------


def show(kept: Kept, delays: Sequence[float]) -> str:
    """Return what has been measured, as Markdown."""
    return "\n\n".join(
        part for part in (_show_network(kept, delays), _show_failure(kept), _show_simulation(kept)) if part
    )


def _show_network(kept: Kept, delays: Sequence[float]) -> str:
    lines = [
        "| servers | round trip | s a token | with trees | round trips a token | with trees | fewer by "
        "| KB a token | with trees | 8 bits, trees: s | KB | same text |",
        "|" + "---|" * 12,
    ]
    ratios, same = [], []
    for parts in (1, 2, 3):
        for delay in delays:
            cells = [
                kept.get(f"network/{parts}/{delay:g}/{tree}/{bits}")
                for tree, bits in (("none", "full"), ("tree", "full"), ("tree", "8"))
            ]
            if None in cells:
                continue
            plain, tree, eight = cells
            ratio = plain["round_trips_per_token"] / tree["round_trips_per_token"]
            ratios.append(ratio)
            same.append(plain["texts"] == tree["texts"])
            lines.append(
                f"| {parts} | {delay * 1e3:g} ms | {plain['seconds_per_token']:.3f} | "
                f"{tree['seconds_per_token']:.3f} | {plain['round_trips_per_token']:.2f} | "
                f"{tree['round_trips_per_token']:.2f} | {ratio:.2f} | {plain['bytes_per_token'] / 1e3:.1f} | "
                f"{tree['bytes_per_token'] / 1e3:.1f} | {eight['seconds_per_token']:.3f} | "
                f"{eight['bytes_per_token'] / 1e3:.1f} | {_agreement(plain, eight):.0%} |"
            )
    if not ratios:
        return ""
    least = min(ratios)
    verdicts = [
        {"claim": f"at least {LEAST_RATIO:g} times fewer round trips a token with trees", "holds":
         least >= LEAST_RATIO, "detail": f"{least:.2f} to {max(ratios):.2f}"},
        {"claim": "the same text with trees", "holds": all(same), "detail": f"{len(same)} rows"},
    ]  # fmt: skip
    return "\n".join([*lines, "", *list_verdicts(verdicts)])


def _agreement(one: dict[str, Any], two: dict[str, Any]) -> float:
    """Return the share of the first text's tokens before the other leaves it."""
    kept, count = 0, 0
    for own, other in zip(one["texts"], two["texts"], strict=True):
        count += len(own)
        kept += next((n for n, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), len(own))
    return kept / count


def _show_failure(kept: Kept) -> str:
    lines = [
        "| a server of two | at | noticed | replaced | tokens read again | whole text | begun again "
        "| without a failure | same text |",
        "|" + "---|" * 9,
    ]
    for key in sorted(key for key in kept if key.startswith("failure/")):
        _, name, share = key.split("/")
        cell = kept[key]
        lines.append(
            f"| {name} | {float(share):.0%} | {cell['noticed_seconds']:.2f} s | "
            f"{cell['recovery_seconds']:.2f} s | "
            f"{cell['replayed_tokens']} | {cell['seconds']:.1f} s | {cell['restart_seconds']:.1f} s | "
            f"{cell['plain_seconds']:.1f} s | {'yes' if cell['same'] else 'no'} |"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def _show_simulation(kept: Kept) -> str:
    lines = [
        "| servers | mean life | a third goes at once | available: all stay | they move "
        "| weakest block, tokens/s: all stay | they move | s a pass | moves an hour and server |",
        "|" + "---|" * 9,
    ]
    for servers, life, blow in itertools.product(SIZES, LIVES, (False, True)):
        cells = [kept.get(f"simulation/{servers}/{life:g}/{blow}/{balances}") for balances in (False, True)]
        if None in cells:
            continue
        (stay, move), mean = cells, statistics.fmean
        lines.append(
            f"| {servers} | {life:g} h | {'yes' if blow else 'no'} | {mean(stay['available']):.1%} | "
            f"{mean(move['available']):.1%} | {mean(stay['weakest_tokens_per_second']):.0f} | "
            f"{mean(move['weakest_tokens_per_second']):.0f} | {mean(move['seconds_per_pass']):.2f} | "
            f"{mean(move['moves_per_server_hour']):.2f} |"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "t2iprobe_swarm")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--parts", default="network,failure,simulation")
    parser.add_argument("--prompts", type=int, default=2, help="one of each task")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--delays", default="0.005,0.05,0.1", help="seconds of a round trip")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    delays = [float(each) for each in given.delays.split(",")]
    kept = Kept(given.work / "measured.json")
    if not given.show:
        identity = {"model": find_language_model(given.model).hash, "prompts": given.prompts,
                    "tokens": given.tokens, "tree": TREE}  # fmt: skip
        check_identity(given.work, identity)
        every = [row for row in choose_rows(PROMPTS, 1) if row[1]["task"] not in OTHER_TASKS]
        rows = every[: given.prompts]
        parts = given.parts.split(",")
        if "simulation" in parts:
            measure_simulation(kept, given.repeats, given.hours)
        if "network" in parts:
            measure_network(kept, given.model, rows, given.tokens, delays)
        if "failure" in parts:
            measure_failure(kept, given.model, rows, given.tokens)
    print(show(kept, delays))
    if given.json:
        given.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()

"""Moves never open a hole, make the weakest block stronger, and end; over random swarms."""

from dataclasses import replace

import numpy as np
import pytest

from t2iprobe.llm.swarm.balancing import (
    BALANCE,
    Placed,
    block_throughputs,
    choose_first,
    decide_move,
    may_leave,
    settle,
)


def random_swarm(rng: np.random.Generator, servers: int, blocks: int) -> list[Placed]:
    found = []
    for number in range(servers):
        length = int(rng.integers(1, blocks + 1))
        # As if they had come in a bad order: clustered, some of them at their best.
        first = int(rng.integers(0, max(1, (blocks - length) // 3 + 1)))
        speed = float(rng.choice([1.0, 10.0, rng.uniform(0.1, 100)]))
        found.append(Placed(f"peer{number:03}", first, first + length, speed))
    return found


def run_rounds(swarm: list[Placed], blocks: int, rng: np.random.Generator) -> tuple[list[Placed], int]:
    """Let each server look in turn, in random order, until a whole round moves nobody; check every move."""
    placed, moves = {server.peer: server for server in swarm}, 0
    while True:
        moved = 0
        for peer in map(str, rng.permutation(sorted(placed))):
            before = block_throughputs(list(placed.values()), blocks)
            first = decide_move(list(placed.values()), peer, blocks, rng)
            if first is None:
                continue
            own = placed[peer]
            placed[peer] = replace(own, first=first, last=first + own.length)
            after = block_throughputs(list(placed.values()), blocks)
            assert 0 <= first <= blocks - own.length
            assert not ((before > 0) & (after <= 0)).any(), "a hole"
            ordered = zip(np.sort(after), np.sort(before), strict=True)
            assert next(new > old for new, old in ordered if abs(new - old) > 1e-6)
            moved += 1
        moves += moved
        assert moves <= 20 * len(swarm), "it does not end"
        if not moved:
            return list(placed.values()), moves


@pytest.mark.parametrize("seed", range(60))
def test_moves_end_and_never_make_a_hole(seed):
    rng = np.random.default_rng(seed)
    servers, blocks = int(rng.integers(1, 26)), int(rng.integers(1, 25))
    swarm = random_swarm(rng, servers, blocks)
    ended, _ = run_rounds(swarm, blocks, rng)
    before, after = (block_throughputs(each, blocks) for each in (swarm, ended))
    assert after.min() >= before.min() - 1e-9
    assert (after > 0).sum() >= (before > 0).sum()


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "servers"), [(0, 200), (1, 120), (2, 60)])
def test_so_it_is_with_up_to_two_hundred_servers(seed, servers):
    rng = np.random.default_rng(seed)
    blocks = 24
    swarm, moves = run_rounds(random_swarm(rng, servers, blocks), blocks, rng)
    assert moves > 5
    now, ideal = (block_throughputs(each, blocks).min() for each in (swarm, settle(swarm, blocks, rng)))
    assert now >= BALANCE * ideal - 1e-6


def test_the_weakest_window_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    for turn in range(100):
        blocks = int(rng.integers(1, 12))
        length = int(rng.integers(1, blocks + 1))
        found = rng.integers(0, 4, blocks).astype(float) if turn % 2 else rng.lognormal(3, 1, blocks).round(9)
        windows = [sorted(found[start : start + length]) for start in range(blocks - length + 1)]
        assert choose_first(found, length) == windows.index(min(windows))


def test_a_server_goes_where_a_block_lacks_but_leaves_none_alone():
    rng = np.random.default_rng(0)
    swarm = [Placed("a", 0, 4, 1.0), Placed("b", 0, 4, 1.0)]
    assert decide_move(swarm, "a", 8, rng) == 4
    moved = [Placed("a", 4, 8, 1.0), Placed("b", 0, 4, 1.0)]
    assert decide_move(moved, "a", 8, rng) is None
    assert decide_move(moved, "b", 8, rng) is None


def test_a_small_gain_is_not_worth_a_move():
    rng = np.random.default_rng(0)
    swarm = [Placed("a", 0, 2, 10.0), Placed("b", 2, 4, 9.0), Placed("c", 0, 2, 0.5)]
    assert decide_move(swarm, "c", 4, rng) is None  # 9 is not less than three quarters of 9.5
    swarm[2] = Placed("c", 0, 2, 9.0)
    swarm[1] = Placed("b", 2, 4, 5.0)
    assert decide_move(swarm, "c", 4, rng) == 2


def test_two_that_cover_for_each_other_do_not_leave_together():
    swarm = [
        Placed("a", 0, 4, 1.0, is_leaving=True),
        Placed("b", 0, 4, 1.0, is_leaving=True),
        Placed("c", 4, 8, 1.0),
    ]
    assert [may_leave(swarm, peer, 8) for peer in "ab"] == [True, False]
    assert not may_leave(swarm, "c", 8)
    # Whoever sees one leaving does not think of moving at all.
    assert (
        decide_move(
            [swarm[0], replace(swarm[1], is_leaving=False), swarm[2]], "b", 8, np.random.default_rng(0)
        )
        is None
    )


@pytest.mark.parametrize("seed", range(100))
def test_whoever_may_leave_leaves_nothing_alone_even_if_all_of_them_do(seed):
    rng = np.random.default_rng(seed)
    servers, blocks = int(rng.integers(2, 13)), int(rng.integers(1, 11))
    swarm = [
        replace(each, is_leaving=bool(rng.random() < 0.6)) for each in random_swarm(rng, servers, blocks)
    ]
    gone = [each for each in swarm if each.is_leaving and may_leave(swarm, each.peer, blocks)]
    before = block_throughputs(swarm, blocks)
    # Each that may leave counted all leaving ones before it as gone, so they may all go.
    after = block_throughputs([each for each in swarm if each not in gone], blocks)
    assert not ((before > 0) & (after <= 0)).any()

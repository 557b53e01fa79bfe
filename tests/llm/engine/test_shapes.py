import time
from collections.abc import Iterator

import numpy as np
import pytest

from t2iprobe.llm.engine.shapes import (
    TreeShape,
    best_expected_tokens,
    chain_shape,
    choose_size,
    expected_tokens,
    optimal_shape,
)

VECTORS = [
    [0.7, 0.15, 0.05],
    [0.4, 0.3, 0.2, 0.1],
    [0.9],
    [0.3, 0.3, 0.3],
    [0.1, 0.5, 0.05, 0.2],  # measured ranks need not fall
    [0.0, 0.6],
    [0.0],
    [],
]


def ordered_forests(nodes: int, depth: int, width: int) -> Iterator[list]:
    """Every sequence of at most `width` ordered trees of at most `depth` levels, `nodes` nodes together."""
    if nodes == 0:
        yield []
    if nodes == 0 or depth == 0 or width == 0:
        return
    for first in range(1, nodes + 1):
        for below in ordered_forests(first - 1, depth - 1, 99):
            for others in ordered_forests(nodes - first, depth, width - 1):
                yield [below, *others]


def value(children: list, acceptance: list[float]) -> float:
    """Expected tokens of a tree given as nested lists, straight from the definition."""
    chances = [*acceptance, *[0.0] * len(children)]
    return 1 + sum(chances[rank] * value(child, acceptance) for rank, child in enumerate(children))


def as_lists(shape: TreeShape) -> list:
    below: list[list] = [[] for _ in range(len(shape))]
    for node in range(1, len(shape)):
        below[shape.parents[node]].append(below[node])
    return below[0]


def check_shape(shape: TreeShape) -> None:
    assert (shape.parents[0], shape.ranks[0], shape.depths[0]) == (-1, 0, 0)
    assert (np.diff(shape.depths) >= 0).all()
    seen: dict[int, int] = {}
    for node in range(1, len(shape)):
        parent = int(shape.parents[node])
        assert 0 <= parent < node
        assert shape.depths[node] == shape.depths[parent] + 1
        assert shape.ranks[node] == seen.get(parent, 0)
        seen[parent] = seen.get(parent, 0) + 1


def test_the_brute_force_knows_every_ordered_tree() -> None:
    # Catalan's numbers count the rooted ordered trees of n nodes.
    assert [sum(1 for _ in ordered_forests(n - 1, 99, 99)) for n in range(1, 9)] == [
        1, 1, 2, 5, 14, 42, 132, 429,
    ]  # fmt: skip


@pytest.mark.parametrize("acceptance", VECTORS, ids=str)
def test_the_optimal_shape_beats_every_tree(acceptance: list[float]) -> None:
    for depth in range(5):
        best = 0.0
        for nodes in range(1, 9):
            best = max([best, *(value(tree, acceptance) for tree in ordered_forests(nodes - 1, depth, 99))])
            shape = optimal_shape(acceptance, nodes, depth)
            check_shape(shape)
            assert len(shape) <= nodes
            assert shape.depths.max() <= depth
            assert expected_tokens(shape, acceptance) == pytest.approx(best, abs=1e-12)
            assert value(as_lists(shape), acceptance) == pytest.approx(best, abs=1e-12)
            assert best_expected_tokens(acceptance, 8, 4)[depth, nodes] == pytest.approx(best, abs=1e-12)


def test_random_vectors_too() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        acceptance = (rng.dirichlet(np.ones(4))[:3] * rng.uniform()).tolist()
        depth = int(rng.integers(1, 5))
        trees = (value(tree, acceptance) for n in range(1, 8) for tree in ordered_forests(n - 1, depth, 99))
        assert expected_tokens(optimal_shape(acceptance, 7, depth), acceptance) == pytest.approx(max(trees))


def test_every_node_is_used_while_it_helps() -> None:
    shape = optimal_shape([0.6, 0.2, 0.1], 40, 20)
    assert len(shape) == 40
    # Subtrees shrink with the rank, as acceptance does.
    sizes = np.ones(40, dtype=int)
    for node in range(39, 0, -1):
        sizes[shape.parents[node]] += sizes[node]
    for node in range(40):
        assert (np.diff(sizes[shape.parents == node]) <= 0).all()
    assert len(optimal_shape([0.6, 0.2], 100, 1)) == 3  # there are no more ranks


def test_a_chain_yields_the_geometric_sum() -> None:
    shape = chain_shape(5)
    check_shape(shape)
    assert expected_tokens(shape, [0.8, 0.1]) == pytest.approx(sum(0.8**level for level in range(6)))
    assert len(chain_shape(0)) == 1


def test_walks_through_the_shape_are_as_long_as_expected() -> None:
    acceptance = [0.55, 0.2, 0.1]
    shape = optimal_shape(acceptance, 24, 6)
    rng = np.random.default_rng(1)
    walks = 40_000
    children = np.full((len(shape), 4), -1)  # the last rank: none is accepted
    for node in range(1, len(shape)):
        children[shape.parents[node], shape.ranks[node]] = node
    at, lengths = np.zeros(walks, dtype=int), np.zeros(walks)
    while (at >= 0).any():
        lengths += at >= 0
        accepted = rng.choice(4, walks, p=[*acceptance, 1 - sum(acceptance)])
        at = np.where(at >= 0, children[at, accepted], -1)
    error = lengths.std() / np.sqrt(walks)
    assert abs(lengths.mean() - expected_tokens(shape, acceptance)) < 3 * error


def test_128_nodes_are_planned_within_a_second() -> None:
    acceptance = 0.5 * 0.5 ** np.arange(16)
    began = time.process_time()
    shape = optimal_shape(acceptance, 128, 10)
    assert time.process_time() - began < 1
    assert len(shape) == 128


@pytest.mark.parametrize("acceptance", [[0.9, 0.2], [-0.1, 0.5], [[0.5]], [float("nan")]], ids=str)
def test_what_is_no_acceptance_vector_is_refused(acceptance: list) -> None:
    with pytest.raises(ValueError, match="acceptance vector"):
        optimal_shape(acceptance, 8, 3)


def test_the_size_is_chosen_by_seconds_a_token() -> None:
    acceptance = [0.7, 0.15, 0.05]
    slow_memory = {1: 1.0, 65: 1.1}
    best, table = choose_size(slow_memory, 0.01, acceptance, [4, 16, 64], [1, 2, 4, 8])
    assert (best.budget, best.depth) == (64, 8)
    assert len(table) == 13
    assert (table[0].budget, table[0].depth, table[0].token_seconds) == (0, 0, 1.0)
    for size in table[1:]:
        shape = optimal_shape(acceptance, size.budget + 1, size.depth)
        assert size.expected_tokens == pytest.approx(expected_tokens(shape, acceptance))
        assert size.draft_seconds == pytest.approx(0.01 * shape.depths.max())
        assert size.target_seconds == pytest.approx(1 + 0.1 * (len(shape) - 1) / 64)
        assert best.token_seconds <= size.token_seconds
    # Where a pass costs as much as its tokens, or the draft as much as the target, a tree does not pay.
    for target, draft in (({1: 1.0, 65: 65.0}, 0.01), (slow_memory, 4.0)):
        assert choose_size(target, draft, acceptance, [4, 16, 64], [1, 2, 4, 8])[0].budget == 0


def test_a_drafts_pass_may_cost_by_its_nodes() -> None:
    # 0.1 s a node: the root first, then those of its children that have children.
    acceptance = [0.5, 0.2, 0.2]
    _, table = choose_size({1: 1.0, 9: 1.0}, {1: 0.1, 3: 0.3}, acceptance, [4, 8], [2])
    for size in table[1:]:
        shape = optimal_shape(acceptance, size.budget + 1, 2)
        second = len(set(shape.parents[shape.depths == 2].tolist()))
        assert size.draft_seconds == pytest.approx(0.1 + 0.1 * second)


def test_no_time_is_made_up_beyond_what_was_measured() -> None:
    with pytest.raises(ValueError, match="a pass over 65 tokens lies outside"):
        choose_size({1: 1.0, 64: 2.0}, 0.1, [0.8, 0.1], [64], [8])

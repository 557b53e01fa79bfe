import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from t2iprobe.llm.engine.growth import Growth, grow, grow_best_first, grow_chain, grow_shaped
from t2iprobe.llm.engine.shapes import TreeShape, optimal_shape
from t2iprobe.llm.engine.tree import DraftTree

SHAPE = TreeShape(
    parents=np.array([-1, 0, 0, 0, 1, 1, 2, 4]),
    ranks=np.array([0, 0, 1, 2, 0, 1, 0, 0]),
    depths=np.array([0, 1, 1, 1, 2, 2, 2, 3]),
)


class TableDraft:
    """A draft that looks the last two tokens up, and checks what a growth promises to a draft's cache."""

    def __init__(self, vocabulary: int, seed: int, spread: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (vocabulary, vocabulary, vocabulary)
        logits = spread * torch.randn(shape, dtype=torch.float64, generator=generator)
        self.log_q = logits.log_softmax(-1)
        self.before = 1  # the token before the root
        self.passes: list[list[int]] = []
        self.seen: list[list[int]] = []

    def fresh(self) -> "TableDraft":
        """The same draft, of which nothing was asked yet."""
        draft = TableDraft(len(self.log_q), 0)
        draft.log_q = self.log_q
        return draft

    def after(self, path: list[int]) -> Tensor:
        """Log q after a path that begins with the root."""
        return self.log_q[([self.before, *path])[-2], path[-1]]

    def __call__(self, tree: DraftTree, nodes: Tensor) -> Tensor:
        expanded = sum(len(numbers) for numbers in self.passes)
        assert nodes.tolist() == list(range(expanded, len(tree)))
        root = int(tree.tokens[0])
        paths = [[root, *tree.path(node).tolist()] for node in range(len(tree))]
        assert paths[:expanded] == self.seen
        self.seen = paths
        self.passes.append(nodes.tolist())
        return torch.stack([self.after(paths[node]) for node in nodes.tolist()])


def all_prefixes(draft: TableDraft, root: int, depth: int, width: int) -> dict[tuple[int, ...], float]:
    """Every prefix of at most `depth` tokens, of which each is among its parent's `width` best: its log q."""
    found: dict[tuple[int, ...], float] = {}
    level = {(): 0.0}
    for _ in range(depth):
        below = {}
        for path, score in level.items():
            log_q = draft.after([root, *path])
            for token in log_q.argsort(descending=True)[:width].tolist():
                if log_q[token] > -math.inf:
                    below[(*path, token)] = score + float(log_q[token])
        found |= below
        level = below
    return found


def prefixes(tree: DraftTree) -> dict[tuple[int, ...], float]:
    return {tuple(tree.path(node).tolist()): float(tree.log_probs[node]) for node in range(1, len(tree))}


def check_origin(tree: DraftTree, draft: TableDraft) -> None:
    root = int(tree.tokens[0])
    for node, old in enumerate(tree.origin.tolist()):
        path = [root, *tree.path(node).tolist()]
        assert path == draft.seen[old] if old >= 0 else path not in draft.seen


@pytest.mark.parametrize("beams", [1, 3, 128])
@pytest.mark.parametrize(("depth", "width"), [(5, None), (5, 2), (3, 3), (1, None)])
def test_best_first_holds_exactly_the_most_probable_prefixes(
    beams: int, depth: int, width: int | None
) -> None:
    for seed, budget in itertools.product(range(6), (1, 2, 7, 30)):
        draft = TableDraft(4, seed, spread=0.5 + seed)
        tree = grow(grow_best_first(2, budget, beams, depth, width), draft)
        every = all_prefixes(draft, 2, depth, width or 4)
        best = dict(sorted(every.items(), key=lambda item: -item[1])[:budget])
        assert prefixes(tree) == pytest.approx(best)
        assert all(len(numbers) <= beams for numbers in draft.passes)
        check_origin(tree, draft)


def test_siblings_stand_in_the_drafts_order() -> None:
    draft = TableDraft(6, 3)
    tree = grow(grow_best_first(0, 40), draft)
    for node in range(len(tree)):
        children = tree.children(node)
        if len(children):
            best = draft.after([0, *tree.path(node).tolist()]).argsort(descending=True)
            assert tree.tokens[children].tolist() == best[: len(children)].tolist()
            assert tree.ranks[children].tolist() == list(range(len(children)))


def test_growth_stops_as_soon_as_no_child_can_enter() -> None:
    sure = TableDraft(4, 0, spread=0.0)
    tree = grow(grow_best_first(0, 4), sure)  # all four tokens are as likely: none below can enter
    assert tree.depths.tolist() == [0, 1, 1, 1, 1]
    assert sure.passes == [[0]]
    # With four more, some second token enters, which only an expansion can tell.
    wider = TableDraft(4, 0, spread=0.0)
    assert grow(grow_best_first(0, 8), wider).depths.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert wider.passes == [[0], [1, 2, 3, 4]]


@pytest.mark.parametrize("beams", [1, 128])
def test_ancestors_stay_when_the_draft_is_certain(beams: int) -> None:
    # log q = 0 along the whole chain: every node ties with its parent.
    draft = TableDraft(3, 0)
    draft.log_q = torch.full((3, 3, 3), -math.inf, dtype=torch.float64)
    draft.log_q[:, :, 1] = 0.0
    tree = grow(grow_best_first(0, 6, beams, depth=10), draft)
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3, 4, 5]
    assert tree.tokens.tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert grow(grow_best_first(0, 6, beams, depth=4), draft.fresh()).budget == 4


@pytest.mark.parametrize("seed", range(4))
def test_forbidden_tokens_are_never_taken(seed: int) -> None:
    draft = TableDraft(4, seed)
    draft.log_q[:, :, 2] = -math.inf
    draft.log_q[:, 3, :] = -math.inf  # nothing follows 3
    for growth in (grow_best_first(0, 50, depth=3), grow_shaped(0, SHAPE), grow_chain(0, 4)):
        tree = grow(growth, draft.fresh())
        assert 2 not in tree.tokens[1:]
        assert 3 not in tree.tokens[tree.parents[1:]]
        assert torch.isfinite(tree.log_probs).all()
    assert prefixes(grow(grow_best_first(0, 50, depth=3), draft.fresh())).keys() == {
        path for path in all_prefixes(draft, 0, 3, 4) if 3 not in path[:-1]
    }


@pytest.mark.parametrize(
    "growth",
    [grow_best_first(7, 0), grow_best_first(7, 5, depth=0), grow_chain(7, 0)],
    ids=["0", "d0", "chain"],
)
def test_no_budget_is_a_lone_root_and_no_pass(growth: Growth) -> None:
    draft = TableDraft(8, 0)
    tree = grow(growth, draft)
    assert (tree.tokens.tolist(), draft.passes) == ([7], [])


@pytest.mark.parametrize("sampled", [False, True])
def test_a_shaped_tree_has_its_shape(sampled: bool) -> None:
    generator = torch.Generator().manual_seed(0) if sampled else None
    for shape in (SHAPE, optimal_shape([0.5, 0.2, 0.1], 20, 5)):
        draft = TableDraft(5, 1)
        tree = grow(grow_shaped(3, shape, generator), draft)
        assert tree.parents.tolist() == shape.parents.tolist()
        assert tree.ranks.tolist() == shape.ranks.tolist()
        assert tree.depths.tolist() == shape.depths.tolist()
        assert len(draft.passes) == shape.depths.max()
        check_origin(tree, draft)
        for node in range(1, len(tree)):
            path = [3, *tree.path(node).tolist()]
            log_q = [float(draft.after(path[:end])[path[end]]) for end in range(1, len(path))]
            assert float(tree.log_probs[node]) == pytest.approx(sum(log_q))
        parents = set(tree.parents[1:].tolist())
        if sampled:
            assert tree.draft_probs is not None
            assert tree.draft_probs.keys() == parents
            for node, q in tree.draft_probs.items():
                assert torch.equal(q, draft.after([3, *tree.path(node).tolist()]).exp())
        else:
            assert tree.draft_probs is None
            for node in parents:
                best = draft.after([3, *tree.path(node).tolist()]).argsort(descending=True)
                children = tree.children(node)
                assert tree.tokens[children].tolist() == best[: len(children)].tolist()


def test_more_children_than_tokens_are_fewer_children() -> None:
    wide = TreeShape(
        np.array([-1, 0, 0, 0, 0, 4]), np.array([0, 0, 1, 2, 3, 0]), np.array([0, 1, 1, 1, 1, 2])
    )
    for generator in (None, torch.Generator().manual_seed(0)):
        draft = TableDraft(3, 0)
        assert grow(grow_shaped(0, wide, generator), draft).parents.tolist() == [-1, 0, 0, 0]
        draft = TableDraft(4, 0)
        draft.log_q[:, :, 1] = -math.inf
        tree = grow(grow_shaped(0, wide, generator), draft)
        assert sorted(tree.tokens[1:].tolist()) == [0, 2, 3]


def test_children_are_drawn_without_replacement_in_order() -> None:
    q = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    star = TreeShape(np.array([-1, 0, 0, 0]), np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]))
    generator = torch.Generator().manual_seed(5)
    counts: dict[tuple[int, ...], int] = {}
    draws = 20_000
    for _ in range(draws):
        drawn = tuple(
            grow(grow_shaped(0, star, generator), lambda tree, nodes: q.log()[None]).tokens[1:].tolist()
        )
        counts[drawn] = counts.get(drawn, 0) + 1
    orders = list(itertools.permutations(range(4), 3))
    chances = []
    for order in orders:
        left, chance = 1.0, 1.0
        for token in order:
            chance *= float(q[token]) / left
            left -= float(q[token])
        chances.append(chance)
    assert sum(chances) == pytest.approx(1)
    found = [counts.get(order, 0) for order in orders]
    assert chisquare(found, draws * np.array(chances)).pvalue > 1e-3


def test_growths_of_several_prompts_share_a_pass() -> None:
    # Stepping several growths together gives what each gives alone.
    makers: list[Callable[[], Growth]] = [
        partial(grow_best_first, 0, 12), partial(grow_chain, 1, 3), partial(grow_shaped, 2, SHAPE)
    ]  # fmt: skip
    alone = [prefixes(grow(make(), TableDraft(4, 0))) for make in makers]
    growths = [make() for make in makers]
    drafts = [TableDraft(4, 0) for _ in makers]
    requests = {number: next(growth) for number, growth in enumerate(growths)}
    together: dict[int, DraftTree] = {}
    while requests:
        for number, request in list(requests.items()):
            try:
                requests[number] = growths[number].send(drafts[number](*request))
            except StopIteration as end:
                together[number] = end.value
                del requests[number]
    assert [prefixes(together[number]) for number in range(len(makers))] == alone


def test_what_a_draft_raises_reaches_the_caller() -> None:
    def broken(tree: DraftTree, nodes: Tensor) -> Tensor:
        raise RuntimeError("the draft broke")

    with pytest.raises(RuntimeError, match="the draft broke"):
        grow(grow_best_first(0, 4), broken)

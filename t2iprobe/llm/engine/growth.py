"""How a draft tree grows: best-first (SpecExec), into a given shape (Sequoia), or as a chain.

A growth is a generator, so that the trees of several prompts can share each pass of the draft. It yields
the tree of the nodes expanded so far together with the numbers of those to expand now, and wants back
log q [F, V]: for each of those F nodes, the draft's processed and normalised log-probabilities of the next
token (-inf: never taken). The nodes to expand now are always the tree's last, and a number never changes
while the tree grows, so that a draft can keep a node's row of its cache under the node's number. The tree
that is returned also holds the nodes that were never expanded, in an order of its own; its `origin` tells
the old numbers.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from t2iprobe.llm.engine.shapes import TreeShape, chain_shape
from t2iprobe.llm.engine.tree import DraftTree, make_tree

Growth = Generator[tuple[DraftTree, Tensor], Tensor, DraftTree]


def grow(growth: Growth, expand: Callable[[DraftTree, Tensor], Tensor]) -> DraftTree:
    """Drive a growth to its end. `expand` takes the tree so far and nodes [F], and returns log q [F, V]."""
    try:
        request = next(growth)
        while True:
            request = growth.send(expand(*request))
    except StopIteration as end:
        return end.value


def grow_best_first(
    root_token: int, budget: int, beams: int = 128, depth: int = 32, width: int | None = None
) -> Growth:
    """Grow the `budget` most probable prefixes under the draft, of at most `depth` tokens (arXiv 2406.02532).

    The budget is joint over all levels. A pass expands at most `beams` nodes, the most probable first; which
    are left wait for the next pass, so that `beams` changes how many passes there are, not the tree. Growth
    stops when no child can enter any more. A child's probability is at most its parent's, and a tie goes to
    the shallower node, then to the older one: ancestors stay. `width` keeps only a node's best children.
    """
    width = budget if width is None else min(width, budget)
    root = _Node(root_token, None, 0.0)
    expanded: list[_Node] = []
    kept: list[_Node] = []  # by probability, at most `budget`
    open_nodes = [root] if budget > 0 and depth > 0 and width > 0 else []
    while open_nodes:
        beam = open_nodes[:beams]
        log_q = yield _number(expanded, beam)
        scores, tokens = log_q.topk(min(width, log_q.shape[-1]))
        scores, tokens = scores.double().cpu().clamp(max=0), tokens.cpu()
        scores += torch.tensor([node.log_prob for node in beam], dtype=torch.float64)[:, None]
        best, places = scores.flatten().sort(descending=True, stable=True)
        rows = (places[:budget] // scores.shape[-1]).tolist()
        found = tokens.flatten()[places[:budget]].tolist()
        for row, token, score in zip(rows, found, best[:budget].tolist(), strict=True):
            if score > -torch.inf:
                kept.append(_Node(token, beam[row], score))
        kept.sort(key=lambda node: (-node.log_prob, node.depth))  # stable: a tie goes to the older node
        del kept[budget:]
        least = kept[-1].log_prob if len(kept) == budget else -torch.inf
        open_nodes = [n for n in kept if n.number < 0 and n.depth < depth and n.log_prob > least]
    return _finish([root, *kept])


def grow_shaped(root_token: int, shape: TreeShape, generator: torch.Generator | None = None) -> Growth:
    """Grow a tree of the given shape, one level a pass (arXiv 2402.12374).

    Without a generator, the children of a node are the draft's most probable tokens in order, for the match
    verifier. With one they are drawn from q without replacement, in the order of the draws, and q is kept in
    `draft_probs` for the residual verifier; the draws are made on the generator's device. Where q has fewer
    tokens than the shape wants children, the missing ones' subtrees are missing, too.
    """
    children: list[list[int]] = [[] for _ in shape.parents]
    for place, parent in enumerate(shape.parents.tolist()):
        if parent >= 0:
            children[parent].append(place)
    grown = {0: _Node(root_token, None, 0.0)}  # place in the shape → node
    drawn_from: dict[int, Tensor] = {}
    expanded: list[_Node] = []
    level = [0] if children[0] else []
    while level:
        log_q = yield _number(expanded, [grown[place] for place in level])
        count = min(max(len(children[place]) for place in level), log_q.shape[-1])
        if generator is None:
            scores, tokens = log_q.topk(count)
        else:
            q = log_q.to(generator.device, torch.float64).exp()
            tokens = (q / torch.empty_like(q).exponential_(generator=generator)).topk(count).indices
            scores = q.gather(-1, tokens).log()
            drawn_from.update(zip(level, q.cpu().unbind(), strict=True))
        for place, row, found in zip(level, scores.tolist(), tokens.tolist(), strict=True):
            for child, score, token in zip(children[place], row, found, strict=False):
                if score > -torch.inf:
                    grown[child] = _Node(token, grown[place], grown[place].log_prob + min(score, 0.0))
        level = [child for place in level for child in children[place] if child in grown and children[child]]
    places = sorted(grown)
    if generator is None:
        return _finish([grown[place] for place in places])
    return _finish(
        [grown[place] for place in places],
        {node: drawn_from[place] for node, place in enumerate(places) if place in drawn_from},
    )


def grow_chain(root_token: int, length: int, generator: torch.Generator | None = None) -> Growth:
    """Grow a chain of `length` guesses: one a pass of the draft."""
    return grow_shaped(root_token, chain_shape(length), generator)


@dataclass(eq=False, slots=True)
class _Node:
    token: int
    parent: "_Node | None"
    log_prob: float
    number: int = -1  # while the tree grows; -1: not expanded
    depth: int = 0

    def __post_init__(self) -> None:
        self.depth = self.parent.depth + 1 if self.parent else 0


def _number(expanded: list[_Node], beam: list[_Node]) -> tuple[DraftTree, Tensor]:
    """Give the nodes of `beam` the next numbers; return what a growth yields."""
    first = len(expanded)
    for number, node in enumerate(beam, first):
        node.number = number
    expanded += beam
    tree = make_tree(
        [node.token for node in expanded],
        [node.parent.number if node.parent else -1 for node in expanded],
        [node.log_prob for node in expanded],
    )
    return tree, torch.arange(first, len(expanded))


def _finish(nodes: list[_Node], draft_probs: dict[int, Tensor] | None = None) -> DraftTree:
    numbers = {id(node): number for number, node in enumerate(nodes)}
    return make_tree(
        [node.token for node in nodes],
        [numbers[id(node.parent)] if node.parent else -1 for node in nodes],
        [node.log_prob for node in nodes],
        [node.number for node in nodes],
        draft_probs,
    )

"""Two exact verifiers of draft trees; what they emit is distributed as the target's own text.

`verify_match` is for deterministic trees: the target's token is drawn as if there were no tree, and the tree
only says whether the next one is known, too (SpecExec, arXiv 2406.02532, section 4). `verify_residual` is for
trees of which the children were drawn from the draft: a child is accepted or rejected so that draft and
correction together follow the target (Sequoia, arXiv 2402.12374, algorithm 2). Each refuses the other's tree,
so that they are never mixed. Both ask for the target's log-probabilities at visited nodes only, and both want
noise that is fresh in each round: noise used twice ties tokens together that are independent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.processing import Sampling
from t2iprobe.llm.engine.tree import DraftTree

# Below this the residual is the rounding of two equal distributions.
_NO_MASS = 1e-12


@dataclass(frozen=True)
class Verified:
    """What a round emits: the tokens of `path`, the accepted nodes without the root, and then `token`."""

    path: list[int]
    token: int


def verify_match(tree: DraftTree, log_p: Callable[[int], Tensor], draw: Callable[[Tensor], int]) -> Verified:
    """Walk down the tree as long as the target's own tokens are in it.

    `log_p` gives the target's processed log-probabilities [V] after a node, `draw` a token from them. Raises
    ValueError for a tree that was drawn at random.
    """
    if tree.draft_probs is not None:
        raise ValueError("the match verifier takes deterministic trees only: verify this one by its residual")
    node = 0
    path: list[int] = []
    while True:
        token = draw(log_p(node))
        child = tree.successors[node].get(token)
        if child is None:
            return Verified(path, token)
        path.append(child)
        node = child


def verify_residual(tree: DraftTree, log_p: Callable[[int], Tensor], generator: torch.Generator) -> Verified:
    """Walk down the tree: accept the first child x with probability min(1, p(x) / q(x)), else try the next.

    After a rejection p becomes norm(max(p − q, 0)), and q loses x, as in drawing without replacement. Where
    no child is accepted, the token is drawn from what p has become. All in float64. `log_p` gives the
    target's processed log-probabilities [V] after a node. Raises ValueError for a tree without `draft_probs`,
    for which this would be wrong.
    """
    if tree.draft_probs is None:
        raise ValueError("the residual verifier takes trees that were drawn at random only: verify by match")
    node = 0
    path: list[int] = []
    while True:
        p = _to_probabilities(log_p(node))
        children = tree.successors[node]
        child = None
        if children:
            q = tree.draft_probs[node].double().cpu().numpy()
            child, p = _try_children(children, p, q / q.sum(), generator)
        if child is None:
            return Verified(path, _draw_token(p, generator))
        path.append(child)
        node = child


def _try_children(
    children: Mapping[int, int], p: np.ndarray, q: np.ndarray, generator: torch.Generator
) -> tuple[int | None, np.ndarray]:
    """Return the accepted child, and what p has become by the rejections before it. `q` is overwritten."""
    for token, child in children.items():
        if _draw_uniform(generator) * q[token] < p[token]:
            return child, p
        residual = np.maximum(p - q, 0.0)
        mass = residual.sum()
        if mass > _NO_MASS:
            p = residual / mass
        q[token] = 0.0
        left = q.sum()
        if left > 0:
            q /= left
    return None, p


def make_draw(sampling: Sampling, generator: torch.Generator) -> Callable[[Tensor], int]:
    """Return what draws a token from log-probabilities [V]: the most probable one at temperature 0.

    It raises UserError where processing has left no token.
    """
    if sampling.temperature == 0:
        return _most_probable
    return lambda log_p: _draw_token(_to_probabilities(log_p), generator)


def _most_probable(log_p: Tensor) -> int:
    token = int(log_p.argmax())
    if not log_p[token] > -torch.inf:
        raise _no_token()
    return token


def _to_probabilities(log_p: Tensor) -> np.ndarray:
    p = np.exp(log_p.double().cpu().numpy())
    mass = p.sum()
    if not mass > 0:
        raise _no_token()
    return p / mass


def _no_token() -> UserError:
    return UserError(
        "the filters forbid every next token (or the model's output is not a number): loosen them"
    )


def _draw_uniform(generator: torch.Generator) -> float:
    return torch.rand((), dtype=torch.float64, device=generator.device, generator=generator).item()


def _draw_token(p: np.ndarray, generator: torch.Generator) -> int:
    sums = np.cumsum(p)
    return int(np.searchsorted(sums, _draw_uniform(generator) * sums[-1], side="right"))

"""Log-probabilities of many continuations at once: texts that begin alike share their beginning's rows.

The texts of a pass form a forest: each row is a token, sees its own ancestors and stands at its depth, as in
a draft tree. A demonstration, a question or a caption that many requests begin with is thus computed once a
pass, and nothing is padded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.decoder import Decoder

__all__ = ["Score", "count_rows", "score_continuations"]

#: Rows of a pass. With layers in slow memory more are better: each pass reads them all again.
ROWS = 512
_SLICE = 128  # rows of logits that are normalised at a time, in float32

Request = tuple[Sequence[int], Sequence[int]]  # context, continuation


@dataclass(frozen=True)
class Score:
    """What a model says of a continuation: each token's log-probability [T], and whether all are best."""

    log_probabilities: NDArray[np.float64]
    is_greedy: bool

    @property
    def total(self) -> float:
        """The log-probability of the whole continuation, in nats."""
        return float(self.log_probabilities.sum())

    @property
    def mean(self) -> float:
        """The same a token."""
        return float(self.log_probabilities.mean())


@dataclass
class _Forest:
    """Token sequences merged at their common beginnings. Node 0 is the first token of the first one."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)  # of each request, its nodes
    numbers: list[int] = field(default_factory=list)  # which request
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def count_new(self, sequence: Sequence[int]) -> int:
        """Return how many nodes a sequence would add."""
        parent = -1
        for place, token in enumerate(sequence):
            found = self._children.get((parent, token))
            if found is None:
                return len(sequence) - place
            parent = found
        return 0

    def add(self, number: int, sequence: Sequence[int]) -> None:
        """Add a request's sequence."""
        parent, path = -1, []
        for depth, token in enumerate(sequence):
            node = self._children.setdefault((parent, token), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(token)
                self.parents.append(parent)
                self.depths.append(depth)
            path.append(node)
            parent = node
        self.paths.append(path)
        self.numbers.append(number)

    def ancestors(self) -> torch.Tensor:
        """Return bool [n, n]: which nodes a node sees, itself included."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return torch.from_numpy(seen)


def score_continuations(
    decoder: Decoder,
    requests: Sequence[Request],
    *,
    rows: int = ROWS,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """Return what the model says of each continuation after its context, token ids both.

    A request that is longer than the model's context loses its beginning. Raises UserError for an empty
    context or continuation.
    """
    for context, continuation in requests:
        if not context or not continuation:
            raise UserError("an empty text has no probability: give context and continuation a token each")
    scores: list[Score | None] = [None] * len(requests)
    done = 0
    for forest in _plant(_cut(requests, decoder.context_length), rows):
        for number, score in _run(decoder, forest, requests):
            scores[number] = score
        done += len(forest.numbers)
        show(done, len(requests))
    return scores  # type: ignore[return-value]  # each was in a forest


def count_rows(requests: Sequence[Request], rows: int = ROWS) -> int:
    """Return the rows that scoring the requests computes, to foresee its cost."""
    return sum(len(forest.tokens) for forest in _plant(_cut(requests, None), rows))


def _cut(requests: Sequence[Request], limit: int | None) -> list[list[int]]:
    """Return what is run of each request: all but its last token, which only is predicted."""
    whole = [[*context, *continuation][:-1] for context, continuation in requests]
    return whole if limit is None else [sequence[-limit:] for sequence in whole]


def _plant(sequences: Sequence[list[int]], rows: int) -> Iterator[_Forest]:
    """Yield forests of about `rows` nodes; neighbours in the order of their tokens share the most."""
    forest = _Forest()
    for number in sorted(range(len(sequences)), key=lambda number: sequences[number]):
        if forest.numbers and len(forest.tokens) + forest.count_new(sequences[number]) > rows:
            yield forest
            forest = _Forest()
        forest.add(number, sequences[number])
    if forest.numbers:
        yield forest


def _run(decoder: Decoder, forest: _Forest, requests: Sequence[Request]) -> Iterator[tuple[int, Score]]:
    targets = [list(requests[number][1]) for number in forest.numbers]
    # The node before each token of the continuation; of a text that was cut, as many as are left.
    asked = [path[-len(target) :] for path, target in zip(forest.paths, targets, strict=True)]
    wanted = sorted({node for nodes in asked for node in nodes})
    others = sorted(set(range(len(forest.tokens))) - set(wanted))
    # Rows may stand in any order: those whose logits are needed stand last, so that only theirs are made.
    order = torch.tensor([*others, *wanted])
    logits = decoder.forward(
        torch.tensor(forest.tokens)[order][None],
        torch.tensor(forest.depths)[order][None],
        forest.ancestors()[order][:, order][None],
        decoder.new_cache(1, len(order)),
        keep=len(wanted),
    )[0]
    place = {node: row for row, node in enumerate(wanted)}
    pairs = [
        (place[node], token)
        for nodes, target in zip(asked, targets, strict=True)
        for node, token in zip(nodes, target[-len(nodes) :], strict=True)
    ]
    found = iter(zip(*_look_up(logits, pairs), strict=True))
    for number, nodes in zip(forest.numbers, asked, strict=True):
        values = [next(found) for _ in nodes]
        yield number, Score(np.array([value for value, _ in values]), all(best for _, best in values))


def _look_up(logits: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> tuple[list[float], list[bool]]:
    """Return the log-probability of each (row, token), and whether it is its row's best."""
    normaliser = torch.cat([part.logsumexp(-1) for part in logits.split(_SLICE)])
    best = logits.argmax(-1)
    rows, tokens = torch.tensor(pairs, device=logits.device).T
    values = logits[rows, tokens].double() - normaliser[rows].double()
    return values.tolist(), (best[rows] == tokens).tolist()

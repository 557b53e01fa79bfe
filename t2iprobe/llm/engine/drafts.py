"""Who guesses: a smaller model, or the text itself.

A draft answers the requests of growing trees (`growth.py`) for all prompts of a batch at once.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.engine.processing import Processing
from t2iprobe.llm.engine.tree import DraftTree

__all__ = ["Draft", "LookupDraft", "ModelDraft", "Request", "histories"]


class Request(NamedTuple):
    """What a growing tree of batch row `row` wants: log q after `nodes` [F], the last nodes of `tree`."""

    row: int
    tree: DraftTree
    nodes: Tensor


class Draft(Protocol):
    """Whoever guesses."""

    passes: int

    @property
    def knows_all(self) -> bool:
        """Whether log q is the distribution of a model, that children can be drawn from."""

    def begin(self, texts: Sequence[Tensor]) -> None:
        """Start anew with these texts, int64 [T_b] each; with none, give back the memory of the last ones."""

    def expand(self, requests: Sequence[Request], processing: Processing) -> list[Tensor]:
        """Return log q [F, V] for each request. A row's first request of a round is its tree's root."""

    def accept(self, row: int, tree: DraftTree, path: Sequence[int], token: int) -> None:
        """Learn that a row's text goes on with the nodes of `path` and then `token`."""

    def settle(self) -> None:
        """Learn that a round is over: all rows that have one were told what they go on with."""

    def select(self, rows: Sequence[int]) -> None:
        """Go on with the texts of these rows only, which are numbered anew in this order. After a round."""


def histories(text: Tensor, tree: DraftTree, nodes: Tensor) -> list[Tensor]:
    """Return the whole history of each node: `text`, which ends with the root, and the path below it."""
    return [torch.cat([text, tree.path(int(node))]) for node in nodes]


class ModelDraft:
    """A smaller model with the target's tokenizer.

    `vocabulary` is the target's number of logits, where padding makes it another than the draft's own: the
    draft never guesses tokens that it lacks, and reads its last one in their place.
    """

    knows_all = True

    def __init__(self, decoder: Decoder, vocabulary: int | None = None) -> None:
        self.decoder = decoder
        self.vocabulary, self.context_length = vocabulary or decoder.vocabulary, decoder.context_length
        self.passes = 0

    def begin(self, texts: Sequence[Tensor]) -> None:
        """Start anew with these texts."""
        self._texts = list(texts)
        self._cache = self.decoder.new_cache(len(texts), 2 * max(map(len, texts), default=0))
        self._slots: list[dict[int, int]] = [{} for _ in texts]  # a node's number → its pending row

    def expand(self, requests: Sequence[Request], processing: Processing) -> list[Tensor]:
        """Run the nodes asked for in one pass; with a root goes what the model has not read of the text."""
        # The trees of a batch begin together.
        begins, before = int(requests[0].nodes[0]) == 0, self.decoder.passes
        logits = self._read(requests) if begins else self._run(requests)
        self.passes += self.decoder.passes - before  # a long text takes several
        found = []
        for request, own in zip(requests, logits, strict=True):
            text = self._texts[request.row]
            paths = histories(text, request.tree, request.nodes) if processing.reads_history else ()
            missing = self.vocabulary - own.shape[1]  # below 0, padding is cut off
            found.append(processing(functional.pad(own, (0, missing), value=-math.inf), paths))
        return found

    def _read(self, requests: Sequence[Request]) -> list[Tensor]:
        """Commit what is new in the texts, the roots included."""
        new = [text[:0] for text in self._texts]
        for request in requests:
            text = self._texts[request.row]
            new[request.row] = self._known(text[self._cache.lengths[request.row] :])
            self._slots[request.row] = {}
        _, logits = self.decoder.prefill(new, self._cache)
        return [logits[request.row][None] for request in requests]

    def _run(self, requests: Sequence[Request]) -> list[Tensor]:
        """Run nodes below the roots; they are pending afterwards."""
        batch, pending = len(self._texts), self._cache.pending
        count = max(len(request.nodes) for request in requests)
        tokens = torch.zeros(batch, count, dtype=torch.int64)
        positions = torch.zeros(batch, count, dtype=torch.int64)
        seen = torch.zeros(batch, count, pending + count, dtype=torch.bool)
        for row, tree, nodes in requests:
            own = len(nodes)
            tokens[row, :own] = tree.tokens[nodes]
            positions[row, :own] = tree.depths[nodes] + len(self._texts[row]) - 1
            slots = self._slots[row]
            slots.update((int(node), pending + place) for place, node in enumerate(nodes))
            known = torch.tensor(list(slots))  # all but the root, which is committed
            seen[row][:own, torch.tensor(list(slots.values()))] = tree.ancestors()[nodes][:, known]
        logits = self.decoder.forward(self._known(tokens), positions, seen, self._cache)
        return [logits[request.row, : len(request.nodes)] for request in requests]

    def _known(self, tokens: Tensor) -> Tensor:
        return tokens.clamp(max=self.decoder.vocabulary - 1)

    def accept(self, row: int, tree: DraftTree, path: Sequence[int], token: int) -> None:
        """Keep the rows of the accepted nodes that were expanded."""
        self._texts[row] = torch.cat([self._texts[row], tree.tokens[list(path)], torch.tensor([token])])
        kept = [self._slots[row][int(tree.origin[node])] for node in path if int(tree.origin[node]) > 0]
        self._slots[row] = dict(enumerate(kept))  # until all rows have said what they keep

    def settle(self) -> None:
        """Forget the rows that no text has kept. Called once all rows of a round have been told."""
        self._cache.keep([list(slots.values()) for slots in self._slots])
        self._slots = [{} for _ in self._texts]

    def select(self, rows: Sequence[int]) -> None:
        """Forget the texts of all other rows."""
        self._texts = [self._texts[row] for row in rows]
        self._slots = [{} for _ in rows]
        self._cache.select(rows)


class LookupDraft:
    """Guesses that the text repeats itself: what followed the last n tokens before (prompt lookup).

    Of each length n up to `longest`, half of the probability that longer ones have left goes to the tokens
    that have followed, by how often they have; the longest that occurred takes its part first.
    """

    knows_all = False

    def __init__(self, vocabulary: int, longest: int = 4) -> None:
        self.vocabulary, self.longest = vocabulary, longest
        self.passes = 0

    def begin(self, texts: Sequence[Tensor]) -> None:
        """Start anew with these texts."""
        self._texts: list[list[int]] = [[] for _ in texts]
        self._followed: list[dict[tuple[int, ...], Counter[int]]] = [{} for _ in texts]
        for row, text in enumerate(texts):
            self._append(row, text.tolist())

    def _append(self, row: int, tokens: Sequence[int]) -> None:
        text, followed = self._texts[row], self._followed[row]
        for token in tokens:
            for size in range(1, min(self.longest, len(text)) + 1):
                followed.setdefault(tuple(text[-size:]), Counter())[token] += 1
            text.append(token)

    def expand(self, requests: Sequence[Request], processing: Processing) -> list[Tensor]:
        """Return what has followed, -inf for all else. The target's filters do not matter here."""
        return [
            torch.stack([self._log_q(row, tree.path(int(node)).tolist()) for node in nodes])
            for row, tree, nodes in requests
        ]

    def _log_q(self, row: int, path: Sequence[int]) -> Tensor:
        recent = [*self._texts[row][-self.longest :], *path]
        q, left = torch.zeros(self.vocabulary, dtype=torch.float64), 1.0
        for size in range(min(self.longest, len(recent)), 0, -1):
            found = self._followed[row].get(tuple(recent[-size:]))
            if found is not None:
                part = left / 2 if size > 1 else left
                total = found.total()
                for token, count in found.items():
                    q[token] += part * count / total
                left -= part
        return q.log()

    def accept(self, row: int, tree: DraftTree, path: Sequence[int], token: int) -> None:
        """Remember what the text goes on with."""
        self._append(row, [*tree.tokens[list(path)].tolist(), token])

    def settle(self) -> None:
        """Nothing to forget."""

    def select(self, rows: Sequence[int]) -> None:
        """Forget the texts of all other rows."""
        self._texts = [self._texts[row] for row in rows]
        self._followed = [self._followed[row] for row in rows]

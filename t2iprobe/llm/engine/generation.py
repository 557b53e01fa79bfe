"""Text from a target that is slow to ask: a draft tree a round, verified in one pass; nothing is lost.

Greedy text is token for token what the target alone would write; sampled text has its distribution.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.decoder import CHUNK, Decoder
from t2iprobe.llm.engine.drafts import Draft, Request, histories
from t2iprobe.llm.engine.growth import Growth, grow_best_first, grow_chain, grow_shaped
from t2iprobe.llm.engine.processing import Processing, Sampling
from t2iprobe.llm.engine.shapes import TreeShape, optimal_shape
from t2iprobe.llm.engine.sizing import Acceptance
from t2iprobe.llm.engine.tree import DraftTree, make_tree
from t2iprobe.llm.engine.verification import make_draw, verify_match, verify_residual

__all__ = ["TREES", "Generated", "Trees", "generate"]

TREES = ("best-first", "optimal", "chain", "none")
# Rounds between two computations of the best size and shape.
REPLAN = 8
# New tokens that a cache has room for at the start; it grows if more are written.
ROOM = 2048
# Beyond this no draft that is worth its passes goes on being right.
MOST_LEVELS = 24


class Sizer(Protocol):
    """Whoever chooses a tree's size from what was measured."""

    def choose(self, acceptance: Acceptance) -> tuple[int, int]:
        """Return budget and depth for the next rounds."""


@dataclass(frozen=True)
class Trees:
    """How trees grow and are verified.

    `growth`: best-first, optimal, chain or none. `budget`: guesses a tree, or a `Sizer` that chooses.
    `depth`: levels at most. `verifier`: match (deterministic trees), residual (children drawn without
    replacement), or auto: residual where that can be and something is sampled, but for best-first trees.
    `acceptance` is where the estimate for the optimal shape begins.
    """

    growth: str = "best-first"
    budget: "int | Sizer" = 64
    depth: int = MOST_LEVELS
    verifier: str = "auto"
    acceptance: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.growth not in TREES:
            raise UserError(f"there is no tree {self.growth!r}: choose {', '.join(TREES)}")
        if self.verifier not in ("auto", "match", "residual"):
            raise UserError(f"there is no verifier {self.verifier!r}: choose auto, match or residual")
        if self.verifier == "residual" and self.growth in ("best-first", "none"):
            raise UserError(
                f"{self.growth} trees are deterministic, and a residual would not be exact for them: "
                "choose the verifier match, or optimal or chain trees"
            )
        if (isinstance(self.budget, int) and self.budget < 0) or self.depth < 0:
            raise UserError("a tree's budget and depth are 0 or more")


@dataclass
class Generated:
    """What became of one prompt. `rounds` holds the tokens that each pass of the target gave it."""

    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    stop_reason: str = ""  # eos, stop, length (as asked) or context (the model's end)
    rounds: list[int] = field(default_factory=list)
    target_passes: int = 0
    draft_passes: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens a pass of the target."""
        return len(self.token_ids) / max(1, self.target_passes)


def generate(
    target: Decoder,
    draft: Draft | None,
    input_ids: Tensor | Sequence[Tensor],
    *,
    sampling: Sampling | None = None,
    trees: Trees | None = None,
    max_new_tokens: int = 128,
    eos_token_ids: Collection[int] = (),
    stop: Sequence[str] = (),
    tokenizer: Any = None,
    processors: Sequence[Any] = (),
    first: int = 0,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> list[Generated]:
    """Continue prompts, int64 [B, T] or one [T_b] each; the prompts of a batch share every pass.

    Args:
        target: the model whose text it is.
        draft: who guesses; None: nobody.
        sampling: how tokens are drawn; greedy without. Each prompt has noise of its own, by the seed.
        trees: how trees grow.
        max_new_tokens: of each prompt; fewer where the model's context ends.
        eos_token_ids: tokens that end a text, and belong to it.
        stop: strings that end a text, and do not belong to it; they need a `tokenizer`.
        tokenizer: if given, `text` is decoded.
        processors: Transformers logits processors beside the sampling's own (see `Processing`).
        first: number of the first prompt among all, as in a file: a prompt's noise comes from its number.
        on_tokens: called with a prompt's row in the batch and its new tokens, after each round.

    Raises UserError for an empty prompt, one that fills the context, a draft of another vocabulary, or a
    logits processor that cannot be replayed.
    """
    texts = [text.to("cpu", torch.int64) for text in input_ids]
    if stop and tokenizer is None:
        raise UserError("stop strings need the tokenizer that they are looked for with")
    run = _Run(
        target, draft, texts, sampling or Sampling(), trees or Trees(), max_new_tokens, processors, first
    )
    ending = Ending(frozenset(eos_token_ids), tuple(stop), tokenizer)
    try:
        while run.active:
            for row, tokens in run.round():
                made, before = run.outcomes[row], len(run.outcomes[row].token_ids)
                made.stop_reason = ending.extend(made.token_ids, tokens, run.most[row], run.is_short[row])
                made.rounds.append(len(made.token_ids) - before)
                if on_tokens is not None:
                    on_tokens(row, made.token_ids[before:])
            run.active = [row for row in run.active if not run.outcomes[row].stop_reason]
    finally:
        if draft is not None:
            draft.begin(())  # gives its cache back
    for made in run.outcomes:
        made.text = None if tokenizer is None else ending.text(made.token_ids, made.stop_reason)
    return run.outcomes


@dataclass(frozen=True)
class Ending:
    """Where a text ends."""

    eos: frozenset[int]
    stop: tuple[str, ...]
    tokenizer: Any

    def extend(self, made: list[int], tokens: Sequence[int], most: int, is_short: bool) -> str:
        """Append `tokens` to `made` as far as they belong there. Returns why it ends, empty where not."""
        for token in tokens:
            made.append(token)
            if token in self.eos:
                return "eos"
            if self.stop and self._first_stop(self._decode(made)) is not None:
                return "stop"
            if len(made) == most:
                return "context" if is_short else "length"
        return ""

    def text(self, made: Sequence[int], reason: str) -> str:
        """Return the text, without the stop string."""
        text = self._decode(made)
        return text[: self._first_stop(text)] if reason == "stop" else text

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _first_stop(self, text: str) -> int | None:
        places = [place for each in self.stop if (place := text.find(each)) >= 0]
        return min(places, default=None)


class _Plan:
    """The size and shape of a prompt's next trees, planned anew every few rounds from what was accepted."""

    def __init__(self, trees: Trees) -> None:
        self.trees = trees
        self.acceptance = Acceptance(trees.acceptance)
        self.rounds = 0
        self._replan()

    def _replan(self) -> None:
        size = self.trees.budget
        if isinstance(size, int):
            self.budget, self.depth = size, self.trees.depth
        else:
            budget, depth = size.choose(self.acceptance)
            self.budget, self.depth = budget, min(depth, self.trees.depth)
        self._vector = self.acceptance.vector()
        self._shapes: dict[int, TreeShape] = {}

    def learn(self, tree: DraftTree, path: Sequence[int]) -> None:
        """Learn from a round."""
        self.acceptance.update(tree, path)
        self.rounds += 1
        if self.rounds % REPLAN == 0:
            self._replan()

    def shape(self, depth: int) -> TreeShape:
        """Return the best shape of that many levels at most."""
        if depth not in self._shapes:
            self._shapes[depth] = optimal_shape(self._vector, self.budget + 1, depth)
        return self._shapes[depth]


class _Run:
    """The state of a call: texts, caches, generators, estimates."""

    def __init__(
        self,
        target: Decoder,
        draft: Draft | None,
        texts: list[Tensor],
        sampling: Sampling,
        trees: Trees,
        max_new_tokens: int,
        processors: Sequence[Any],
        first: int,
    ) -> None:
        self.target, self.draft, self.trees = target, draft, trees
        check_texts(target, draft, texts, max_new_tokens)
        self.texts = texts
        self.most = [count_room(target, text, max_new_tokens) for text in texts]
        self.is_short = [most < max_new_tokens for most in self.most]
        self.outcomes = [Generated() for _ in texts]
        self.active = list(range(len(texts)))
        self.processing = Processing(sampling, processors)
        self.is_random = _is_random(trees, sampling, draft)
        # Apart, so that another draft does not move what the target draws.
        self.drawn = [make_generator(sampling.seed, first + row, "draft") for row in self.active]
        self.verified = [make_generator(sampling.seed, first + row, "verify") for row in self.active]
        self.draws = [make_draw(sampling, generator) for generator in self.verified]
        # Each prompt's own, so that its text does not depend on what shares the batch.
        self.plans = [_Plan(trees) for _ in texts]
        if texts:
            capacity = max(map(len, texts)) + min(max(self.most), ROOM) + 64
            self.cache = target.new_cache(len(texts), capacity)
            if draft is not None:
                draft.begin(texts)

    def round(self) -> list[tuple[int, list[int]]]:
        """Grow, verify, keep. Returns each active row's new tokens."""
        began = time.perf_counter()
        drafted = self.draft.passes if self.draft else 0
        self._catch_up()
        grown = self._grow()
        logits = self._run_target(grown)
        found, kept = [], [torch.arange(0)] * len(self.texts)
        for row, tree in grown.items():
            verified = self._verify(row, tree, logits[row])
            self.plans[row].learn(tree, verified.path)
            tokens = [*tree.tokens[verified.path].tolist(), verified.token]
            new = len(self.texts[row]) - self.cache.lengths[row] - 1  # what stood before the root
            start = self._chain - new
            kept[row] = torch.tensor(
                [*range(start, self._chain), *(self._chain + node for node in (0, *verified.path))]
            )
            self.texts[row] = torch.cat([self.texts[row], torch.tensor(tokens)])
            if self.draft is not None:
                self.draft.accept(row, tree, verified.path, verified.token)
            found.append((row, tokens))
        self.cache.keep(kept)
        if self.draft is not None:
            self.draft.settle()
        elapsed = time.perf_counter() - began
        for row in grown:
            made = self.outcomes[row]
            made.target_passes += 1
            made.draft_passes += (self.draft.passes if self.draft else 0) - drafted
            made.seconds += elapsed
        return found

    def _catch_up(self) -> None:
        """Read long prompts first; of what is left the first pass with a tree reads all."""
        waiting = [text[length:-1] for text, length in zip(self.texts, self.cache.lengths, strict=True)]
        if max(map(len, waiting)) > CHUNK:
            self.target.prefill(waiting, self.cache)
            for row in self.active:
                self.outcomes[row].target_passes += 1

    def _grow(self) -> dict[int, DraftTree]:
        growths = {row: self._start(row) for row in self.active}
        trees = {row: make_tree([int(self.texts[row][-1])], [-1]) for row in self.active}
        asked: dict[int, Request] = {}
        answers: dict[int, Tensor | None] = {row: None for row, growth in growths.items() if growth}
        while answers:
            for row, answer in answers.items():
                growth = growths[row]
                assert growth is not None
                try:
                    asked[row] = Request(row, *growth.send(answer))  # type: ignore[arg-type]  # None begins
                except StopIteration as end:
                    trees[row] = end.value
                    asked.pop(row, None)
            requests = list(asked.values())
            if not requests:
                break
            assert self.draft is not None
            answers = {
                request.row: answer
                for request, answer in zip(
                    requests, self.draft.expand(requests, self.processing), strict=True
                )
            }
        return trees

    def _start(self, row: int) -> Growth | None:
        """Return the growth of a row's next tree, None for none."""
        left = self.most[row] - len(self.outcomes[row].token_ids) - 1  # the target adds one token itself
        plan = self.plans[row]
        depth = min(plan.depth, left)
        if self.draft is None or self.trees.growth == "none" or plan.budget == 0 or depth == 0:
            return None
        root = int(self.texts[row][-1])
        generator = self.drawn[row] if self.is_random else None
        if self.trees.growth == "best-first":
            return grow_best_first(root, plan.budget, depth=depth)
        if self.trees.growth == "chain":
            return grow_chain(root, min(plan.budget, left), generator)
        return grow_shaped(root, plan.shape(depth), generator)

    def _run_target(self, grown: dict[int, DraftTree]) -> Tensor:
        """Run what the target has not read of each text, and the trees behind it: logits [B, nodes, V]."""
        waiting = [
            len(text) - length - 1 for text, length in zip(self.texts, self.cache.lengths, strict=True)
        ]
        self._chain = chain = max(waiting[row] for row in grown)
        nodes = max(map(len, grown.values()))
        rows = len(self.texts)
        tokens = torch.zeros(rows, chain + nodes, dtype=torch.int64)
        positions = torch.zeros(rows, chain + nodes, dtype=torch.int64)
        seen = torch.zeros(rows, chain + nodes, chain + nodes, dtype=torch.bool)
        for row, tree in grown.items():
            text, new, size = self.texts[row], waiting[row], len(tree)
            real = slice(chain - new, chain)  # padding stands in front of the text and behind the tree
            tokens[row, real] = text[-new - 1 : -1]
            positions[row, real] = torch.arange(len(text) - 1 - new, len(text) - 1)
            seen[row, real, real] = torch.ones(new, new, dtype=torch.bool).tril()
            tokens[row, chain : chain + size] = tree.tokens
            positions[row, chain : chain + size] = len(text) - 1 + tree.depths
            seen[row, chain : chain + size, real] = True
            seen[row, chain : chain + size, chain : chain + size] = tree.ancestors()
        return self.target.forward(tokens, positions, seen, self.cache, keep=nodes)

    def _verify(self, row: int, tree: DraftTree, logits: Tensor) -> Any:
        def log_p(node: int) -> Tensor:
            paths: Sequence[Tensor] = ()
            if self.processing.reads_history:
                paths = histories(self.texts[row], tree, torch.tensor([node]))
            return self.processing(logits[node], paths)

        if tree.draft_probs is None:
            return verify_match(tree, log_p, self.draws[row])
        return verify_residual(tree, log_p, self.verified[row])


def _is_random(trees: Trees, sampling: Sampling, draft: Draft | None) -> bool:
    """Whether children are drawn from the draft, to be verified by their residual."""
    can = draft is not None and draft.knows_all and trees.growth in ("optimal", "chain")
    if trees.verifier == "residual" and not can:
        raise UserError("children cannot be drawn from this draft, it knows no distribution: verify by match")
    if trees.verifier == "auto":
        return can and sampling.temperature > 0
    return trees.verifier == "residual"


def check_texts(target: Decoder, draft: Draft | None, texts: Sequence[Tensor], max_new_tokens: int) -> None:
    """Raise UserError for texts [T_b] that cannot be continued."""
    if max_new_tokens < 1:
        raise UserError(f"{max_new_tokens} new tokens cannot be written: ask for 1 or more")
    if not all(map(len, texts)):
        raise UserError("an empty prompt has nothing to be continued: give it a token, such as BOS")
    limit = target.context_length
    if limit is not None and (longest := max(map(len, texts), default=0)) >= limit:
        raise UserError(
            f"the prompt has {longest} tokens and the model's context ends at {limit}: shorten it"
        )
    _check_vocabulary(target, draft, texts)


def count_room(target: Decoder, text: Tensor, max_new_tokens: int) -> int:
    """Return how many tokens can follow a text: as asked, or up to the end of the model's context."""
    limit = target.context_length
    return min(max_new_tokens, limit - len(text)) if limit else max_new_tokens


def _check_vocabulary(target: Decoder, draft: Draft | None, texts: Sequence[Tensor]) -> None:
    size = getattr(draft, "vocabulary", None)
    if size is not None and size != target.vocabulary:
        raise UserError(
            f"the draft has {size} tokens and the target {target.vocabulary}: "
            "a draft needs the target's own tokenizer"
        )
    if any(len(text) and not 0 <= int(text.min()) <= int(text.max()) < target.vocabulary for text in texts):
        raise UserError(f"the prompt has tokens that the model's vocabulary of {target.vocabulary} lacks")


def make_generator(seed: int, number: int, use: str) -> torch.Generator:
    """Return the noise of a prompt: `use` is draft for what a draft draws, verify for the target's own."""
    digest = hashlib.sha256(f"{seed}/{number}/{use}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

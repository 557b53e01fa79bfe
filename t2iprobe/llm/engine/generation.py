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
from t2iprobe.llm.engine.verification import Verified, make_draw, verify_match, verify_residual

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
    """Continue prompts, int64 [B, T] or one [T_b] each; those of a batch that go on share every pass.

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

    Raises UserError for an empty prompt, one that fills the context, a draft of another vocabulary, an empty
    stop string, or a logits processor that cannot be replayed.
    """
    texts = [text.to("cpu", torch.int64) for text in input_ids]
    ending = Ending(frozenset(eos_token_ids), tuple(stop), tokenizer)
    run = _Run(
        target, draft, texts, sampling or Sampling(), trees or Trees(), max_new_tokens, processors, first
    )
    try:
        while run.prompts:
            for prompt, tokens in run.round():
                made, before = prompt.made, len(prompt.made.token_ids)
                made.stop_reason = ending.extend(made.token_ids, tokens, prompt.most, prompt.is_short)
                made.rounds.append(len(made.token_ids) - before)
                if on_tokens is not None:
                    on_tokens(prompt.row, made.token_ids[before:])
            run.drop_ended()
    finally:
        if draft is not None:
            draft.begin(())  # gives its cache back
    for made in run.outcomes:
        made.text = None if tokenizer is None else ending.text(made.token_ids, made.stop_reason)
    return run.outcomes


@dataclass(frozen=True)
class Ending:
    """Where a text ends. Raises UserError for an empty stop string, and for one without a tokenizer."""

    eos: frozenset[int]
    stop: tuple[str, ...]
    tokenizer: Any

    def __post_init__(self) -> None:
        if self.stop and self.tokenizer is None:
            raise UserError("stop strings need the tokenizer that they are looked for with")
        if not all(self.stop):
            raise UserError("an empty stop string would end every text at once: leave it out")

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


@dataclass
class _Prompt:
    """A text that goes on: `row` in the batch as it was given, and what is its own alone."""

    row: int
    text: Tensor
    most: int
    is_short: bool  # of what was asked for: the model's context ends before
    plan: _Plan  # so that a text does not depend on what shares the batch
    drawn: torch.Generator  # apart from `verified`, so that another draft does not move what the target draws
    verified: torch.Generator
    draw: Callable[[Tensor], int]
    made: Generated


class _Run:
    """The state of a call. A prompt's place in `prompts` is its row in the caches of target and draft."""

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
        self.processing = Processing(sampling, processors)
        self.is_random = _is_random(trees, sampling, draft)
        self.prompts: list[_Prompt] = []
        for row, text in enumerate(texts):
            most = count_room(target, text, max_new_tokens)
            drawn, verified = (make_generator(sampling.seed, first + row, use) for use in ("draft", "verify"))
            draw = make_draw(sampling, verified)
            plan, made = _Plan(trees), Generated()
            self.prompts.append(
                _Prompt(row, text, most, most < max_new_tokens, plan, drawn, verified, draw, made)
            )
        self.outcomes = [prompt.made for prompt in self.prompts]
        if texts:
            most = max(prompt.most for prompt in self.prompts)
            self.cache = target.new_cache(len(texts), max(map(len, texts)) + min(most, ROOM) + 64)
            if draft is not None:
                draft.begin(texts)

    def round(self) -> list[tuple[_Prompt, list[int]]]:
        """Grow, verify, keep. Returns each prompt's new tokens."""
        began = time.perf_counter()
        drafted = self.draft.passes if self.draft else 0
        self._catch_up()
        trees = self._grow()
        waiting = self._waiting()
        logits = self._run_target(trees, waiting)
        chain = max(waiting)
        found: list[tuple[_Prompt, list[int]]] = []
        kept: list[Tensor] = []
        for place, (prompt, tree) in enumerate(zip(self.prompts, trees, strict=True)):
            verified = self._verify(prompt, tree, logits[place])
            prompt.plan.learn(tree, verified.path)
            tokens = [*tree.tokens[verified.path].tolist(), verified.token]
            read = range(chain - waiting[place], chain)  # what stood before the root
            kept.append(torch.tensor([*read, *(chain + node for node in (0, *verified.path))]))
            prompt.text = torch.cat([prompt.text, torch.tensor(tokens)])
            if self.draft is not None:
                self.draft.accept(place, tree, verified.path, verified.token)
            found.append((prompt, tokens))
        self.cache.keep(kept)
        if self.draft is not None:
            self.draft.settle()
            drafted = self.draft.passes - drafted
        elapsed = time.perf_counter() - began
        for prompt in self.prompts:
            prompt.made.target_passes += 1
            prompt.made.draft_passes += drafted
            prompt.made.seconds += elapsed
        return found

    def drop_ended(self) -> None:
        """Compute no further rows for texts that have ended."""
        going = [place for place, prompt in enumerate(self.prompts) if not prompt.made.stop_reason]
        if 0 < len(going) < len(self.prompts):
            self.cache.select(going)
            if self.draft is not None:
                self.draft.select(going)
        self.prompts = [self.prompts[place] for place in going]

    def _waiting(self) -> list[int]:
        """Return how many tokens of each text, its last one apart, the target has not read."""
        lengths = self.cache.lengths
        return [len(prompt.text) - 1 - length for prompt, length in zip(self.prompts, lengths, strict=True)]

    def _catch_up(self) -> None:
        """Read long prompts first; of what is left the first pass with a tree reads all."""
        waiting = self._waiting()
        if max(waiting) > CHUNK:
            before = self.target.passes
            texts = [
                prompt.text[len(prompt.text) - 1 - new : -1]
                for prompt, new in zip(self.prompts, waiting, strict=True)
            ]
            self.target.prefill(texts, self.cache)
            for prompt in self.prompts:
                prompt.made.target_passes += self.target.passes - before

    def _grow(self) -> list[DraftTree]:
        growths = [self._start(prompt) for prompt in self.prompts]
        trees = [make_tree([int(prompt.text[-1])], [-1]) for prompt in self.prompts]
        asked: dict[int, Request] = {}
        answers: dict[int, Tensor | None] = {place: None for place, growth in enumerate(growths) if growth}
        while answers:
            for place, answer in answers.items():
                growth = growths[place]
                assert growth is not None
                try:
                    asked[place] = Request(place, *growth.send(answer))  # type: ignore[arg-type]  # None begins
                except StopIteration as end:
                    trees[place] = end.value
                    asked.pop(place, None)
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

    def _start(self, prompt: _Prompt) -> Growth | None:
        """Return the growth of a prompt's next tree, None for none."""
        plan, left = prompt.plan, prompt.most - len(prompt.made.token_ids)
        most = left - 1  # the target adds one token itself
        if (limit := getattr(self.draft, "context_length", None)) is not None:
            most = min(most, limit + 1 - len(prompt.text))  # the last guesses are not read by the draft
        depth = min(plan.depth, most)
        if self.draft is None or self.trees.growth == "none" or plan.budget == 0 or depth <= 0:
            return None
        root = int(prompt.text[-1])
        generator = prompt.drawn if self.is_random else None
        if self.trees.growth == "best-first":
            return grow_best_first(root, plan.budget, depth=depth)
        if self.trees.growth == "chain":
            return grow_chain(root, min(plan.budget, most), generator)
        return grow_shaped(root, plan.shape(depth), generator)

    def _run_target(self, trees: Sequence[DraftTree], waiting: Sequence[int]) -> Tensor:
        """Run what the target has not read of each text, and the trees behind it: logits [B, nodes, V]."""
        chain, nodes, rows = max(waiting), max(map(len, trees)), len(trees)
        tokens = torch.zeros(rows, chain + nodes, dtype=torch.int64)
        positions = torch.zeros(rows, chain + nodes, dtype=torch.int64)
        seen = torch.zeros(rows, chain + nodes, chain + nodes, dtype=torch.bool)
        for row, (prompt, tree, new) in enumerate(zip(self.prompts, trees, waiting, strict=True)):
            text, size = prompt.text, len(tree)
            real = slice(chain - new, chain)  # padding stands in front of the text and behind the tree
            tokens[row, real] = text[-new - 1 : -1]
            positions[row, real] = torch.arange(len(text) - 1 - new, len(text) - 1)
            seen[row, real, real] = torch.ones(new, new, dtype=torch.bool).tril()
            tokens[row, chain : chain + size] = tree.tokens
            positions[row, chain : chain + size] = len(text) - 1 + tree.depths
            seen[row, chain : chain + size, real] = True
            seen[row, chain : chain + size, chain : chain + size] = tree.ancestors()
        return self.target.forward(tokens, positions, seen, self.cache, keep=nodes)

    def _verify(self, prompt: _Prompt, tree: DraftTree, logits: Tensor) -> Verified:
        def log_p(node: int) -> Tensor:
            paths: Sequence[Tensor] = ()
            if self.processing.reads_history:
                paths = histories(prompt.text, tree, torch.tensor([node]))
            return self.processing(logits[node], paths)

        if tree.draft_probs is None:
            return verify_match(tree, log_p, prompt.draw)
        return verify_residual(tree, log_p, prompt.verified)


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
        raise UserError(f"the prompt has {longest} tokens and {target.context_end}: shorten it")
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

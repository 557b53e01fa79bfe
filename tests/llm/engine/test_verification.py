"""Is what the verifiers emit distributed as the target's own text? Judged on two rounds and more together.

The models are tables: the next token depends on the last two. Each trial continues one prompt by four tokens,
in two rounds or more; the counts of all continuations are compared with their exact probabilities.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.growth import Growth, grow, grow_best_first, grow_chain, grow_shaped
from t2iprobe.llm.engine.processing import Processing, Sampling
from t2iprobe.llm.engine.shapes import TreeShape, chain_shape, optimal_shape
from t2iprobe.llm.engine.tree import DraftTree, make_tree
from t2iprobe.llm.engine.verification import _try_children, make_draw, verify_match, verify_residual

PROMPT = (2, 0, 1)
TOKENS = 4
Text = tuple[int, ...]
Counts = Counter[Text]

FILTERS = {
    "temperature": Sampling(temperature=0.7),
    "top-k": Sampling(temperature=1.0, top_k=3),
    "top-p": Sampling(temperature=1.2, top_p=0.8),
    "min-p": Sampling(temperature=1.3, min_p=0.15),
    "repetition": Sampling(temperature=1.0, repetition_penalty=1.5),
    "n-gram": Sampling(temperature=1.0, no_repeat_ngram=2),
    "all": Sampling(
        temperature=1.5, top_k=4, top_p=0.95, min_p=0.03, repetition_penalty=1.3, no_repeat_ngram=3
    ),
}
SHAPE = TreeShape(np.array([-1, 0, 0, 1, 1]), np.array([0, 0, 1, 0, 1]), np.array([0, 1, 1, 2, 2]))


@dataclass
class TableModel:
    """Log-probabilities from a table [V, V, V] of logits, each text's processed once."""

    logits: Tensor
    processing: Processing
    known: dict[Text, Tensor] = field(default_factory=dict)

    def after(self, text: Text) -> Tensor:
        if text not in self.known:
            history = torch.tensor(text)
            self.known[text] = self.processing(self.logits[history[-2], history[-1]], [history])
        return self.known[text]


def make_models(sampling: Sampling, seed: int = 0, vocabulary: int = 5) -> tuple[TableModel, TableModel]:
    """A target and a draft that is right about half of the time."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, vocabulary, vocabulary, vocabulary)
    logits, other = 1.2 * torch.randn(shape, dtype=torch.float64, generator=generator)
    processing = Processing(sampling)
    return TableModel(logits, processing), TableModel(0.6 * logits + 0.8 * other, processing)


def exact(target: TableModel, tokens: int = TOKENS) -> dict[Text, float]:
    """The probability of each continuation of the prompt in plain sampling."""
    chances = {(): 1.0}
    for _ in range(tokens):
        chances = {
            (*path, token): chance * p
            for path, chance in chances.items()
            for token, p in enumerate(target.after(PROMPT + path).exp().tolist())
        }
    return chances


def pvalue(counts: Counts, chances: dict[Text, float]) -> float:
    """Pearson's chi-square over all continuations; those expected fewer than ten times are one cell."""
    draws = sum(counts.values())
    assert not [text for text in counts if chances[text] == 0], "a filtered token was emitted"
    expected = {text: draws * chance for text, chance in chances.items()}
    cells = [(counts[text], mean) for text, mean in expected.items() if mean >= 10]
    rare = [(counts[text], mean) for text, mean in expected.items() if 0 < mean < 10]
    if sum(mean for _, mean in rare) >= 10:
        cells.append((sum(count for count, _ in rare), sum(mean for _, mean in rare)))
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    return float(chi2.sf(statistic, len(cells) - 1))


def texts_of(text: Text, tree: DraftTree) -> list[Text]:
    texts = [text]
    for parent, token in zip(tree.parents.tolist()[1:], tree.tokens.tolist()[1:], strict=True):
        texts.append((*texts[parent], token))
    return texts


Round = Callable[[Text], Text]


def run_trials(emit: Round, trials: int) -> tuple[Counts, float]:
    """Count continuations. `emit` is a round: text → new tokens. Also the tokens of a round on average."""
    counts: Counts = Counter()
    rounds = emitted = 0
    for _ in range(trials):
        text = PROMPT
        while len(text) < len(PROMPT) + TOKENS:
            new = emit(text)
            text += new
            rounds += 1
            emitted += len(new)
        counts[text[len(PROMPT) : len(PROMPT) + TOKENS]] += 1
    return counts, emitted / rounds


class Noise:
    """The generator of a call. With the bug `reuse`, each of a trial's rounds has the noise of its first."""

    def __init__(self, seed: int, bug: str = "") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.first = self.generator.get_state()
        self.bug = bug

    def begin_round(self, text: Text) -> None:
        if self.bug == "reuse":
            if text == PROMPT:
                self.first = self.generator.get_state()
            self.generator.set_state(self.first)


def match_round(
    target: TableModel, draft: TableModel, make_growth: Callable[[int], Growth], seed: int, bug: str = ""
) -> Round:
    """Rounds of deterministic trees, each text's grown once."""
    noise = Noise(seed, bug)
    draw = make_draw(target.processing.sampling, noise.generator)
    grown: dict[Text, tuple[DraftTree, list[Tensor]]] = {}

    def emit(text: Text) -> Text:
        noise.begin_round(text)
        if text not in grown:
            tree = grow_on(make_growth(text[-1]), draft, text)
            grown[text] = tree, [target.after(path) for path in texts_of(text, tree)]
        tree, log_p = grown[text]
        verified = verify_match(tree, log_p.__getitem__, draw)
        return (*tree.tokens[verified.path].tolist(), verified.token)

    return emit


def residual_round(
    target: TableModel, draft: TableModel, shape: TreeShape, seed: int, bug: str = ""
) -> Round:
    """Rounds of drawn trees, or, with a bug, of what should not be verified like that."""
    noise = Noise(seed, bug)

    def emit(text: Text) -> Text:
        noise.begin_round(text)
        generator = None if bug == "top-k tree" else noise.generator
        tree = grow_on(grow_shaped(text[-1], shape, generator), draft, text)
        texts = texts_of(text, tree)
        if bug == "top-k tree":
            tree = replace(tree, draft_probs={n: draft.after(t).exp() for n, t in enumerate(texts)})
        if bug == "unfiltered q":
            raw = {n: draft.logits[t[-2], t[-1]].softmax(-1) for n, t in enumerate(texts)}
            tree = replace(tree, draft_probs=raw)
        verified = verify_residual(tree, lambda node: target.after(texts[node]), noise.generator)
        return (*(texts[node][-1] for node in verified.path), verified.token)

    return emit


def grow_on(growth: Growth, draft: TableModel, text: Text) -> DraftTree:
    def expand(tree: DraftTree, nodes: Tensor) -> Tensor:
        texts = texts_of(text, tree)
        return torch.stack([draft.after(texts[node]) for node in nodes.tolist()])

    return grow(growth, expand)


MATCH_GROWTHS: dict[str, Callable[[int], Growth]] = {
    "best-first": lambda root: grow_best_first(root, 6),
    "optimal": lambda root: grow_shaped(root, optimal_shape([0.5, 0.2, 0.1], 7, 2)),
    "chain": lambda root: grow_chain(root, 3),
}
SHAPES = {"tree": SHAPE, "optimal": optimal_shape([0.5, 0.2, 0.1], 7, 3), "chain": chain_shape(3)}


def check(emit: Round, target: TableModel, trials: int) -> None:
    counts, tokens_per_round = run_trials(emit, trials)
    assert tokens_per_round > 1.4  # drafts are accepted, and there are two rounds and more
    assert pvalue(counts, exact(target)) > 1e-3


def test_match_is_exact_over_rounds() -> None:
    target, draft = make_models(FILTERS["all"])
    check(match_round(target, draft, MATCH_GROWTHS["best-first"], 1), target, 10_000)


def test_residual_is_exact_over_rounds() -> None:
    target, draft = make_models(FILTERS["all"])
    check(residual_round(target, draft, SHAPE, 1), target, 4_000)


@pytest.mark.slow
@pytest.mark.parametrize("growth", MATCH_GROWTHS)
@pytest.mark.parametrize("name", FILTERS)
def test_match_is_exact_in_200k_draws(name: str, growth: str) -> None:
    if growth != "best-first" and name != "all":
        pytest.skip("every filter with best-first trees, every tree with all filters")
    target, draft = make_models(FILTERS[name])
    check(match_round(target, draft, MATCH_GROWTHS[growth], 2), target, 200_000)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FILTERS)
def test_residual_is_exact_in_200k_draws(name: str, shape: str) -> None:
    if shape != "tree" and name != "all":
        pytest.skip("every filter with one tree, every tree with all filters")
    target, draft = make_models(FILTERS[name])
    check(residual_round(target, draft, SHAPES[shape], 2), target, 200_000)


def test_noise_reused_between_rounds_is_caught_in_match() -> None:
    target, draft = make_models(FILTERS["temperature"])
    emit = match_round(target, draft, MATCH_GROWTHS["best-first"], 3, bug="reuse")
    assert pvalue(run_trials(emit, 4_000)[0], exact(target)) < 1e-9


@pytest.mark.parametrize("bug", ["reuse", "top-k tree", "unfiltered q"])
def test_planted_bugs_are_caught_in_residual(bug: str) -> None:
    target, draft = make_models(FILTERS["temperature"])
    emit = residual_round(target, draft, SHAPE, 3, bug)
    assert pvalue(run_trials(emit, 3_000)[0], exact(target)) < 1e-9


@pytest.mark.parametrize("growth", MATCH_GROWTHS)
@pytest.mark.parametrize("penalties", [{}, {"repetition_penalty": 1.2, "no_repeat_ngram": 4}], ids=str)
def test_greedy_text_is_that_of_plain_decoding(growth: str, penalties: dict[str, Any]) -> None:
    for seed in range(5):
        target, draft = make_models(Sampling(**penalties), seed, vocabulary=8)
        plain = PROMPT
        for _ in range(40):
            plain += (int(target.after(plain).argmax()),)
        emit = match_round(target, draft, MATCH_GROWTHS[growth], 0)
        text, rounds = PROMPT, 0
        while len(text) < len(plain):
            text += emit(text)
            rounds += 1
        assert text[: len(plain)] == plain
        assert rounds < 40


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_visited_nodes_are_asked_for(temperature: float) -> None:
    target, draft = make_models(Sampling(temperature=temperature))
    generator = torch.Generator().manual_seed(0)
    for grown_with in (None, generator):
        for _ in range(20):
            tree = grow_on(grow_shaped(PROMPT[-1], SHAPE, grown_with), draft, PROMPT)
            texts, asked = texts_of(PROMPT, tree), []

            def log_p(node: int, asked: list = asked, texts: list = texts) -> Tensor:
                asked.append(node)
                return target.after(texts[node])

            if grown_with is None:
                verified = verify_match(tree, log_p, make_draw(target.processing.sampling, generator))
            else:
                verified = verify_residual(tree, log_p, generator)
            assert asked == [0, *verified.path]
            assert all(tree.parents[node] == above for above, node in itertools.pairwise(asked))


def star(q: Tensor, children: int, generator: torch.Generator) -> DraftTree:
    nodes = np.arange(children + 1)
    shape = TreeShape(np.minimum(nodes, 1) - 1, np.maximum(nodes - 1, 0), np.minimum(nodes, 1))
    return grow(grow_shaped(0, shape, generator), lambda tree, wanted: q.log().expand(len(wanted), -1))


P = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


@pytest.mark.parametrize(
    ("q", "p"),
    [
        pytest.param([0.5, 0.3, 0.15, 0.05], P, id="far"),
        pytest.param(P, P, id="equal"),
        pytest.param([0.0, 0.0, 1.0, 0.0], P, id="q exhausted by its first child"),
        pytest.param([0.0, 0.6, 0.4, 0.0], P, id="q exhausted by its children"),
        pytest.param([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.7, 0.3], id="no token in common"),
        pytest.param([0.7, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0], id="one token left"),
    ],
)
def test_one_round_emits_the_target(q: Any, p: Any) -> None:
    q, p = torch.as_tensor(q, dtype=torch.float64), torch.as_tensor(p, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    counts: Counts = Counter()
    first = 0
    draws = 3_000
    for _ in range(draws):
        tree = star(q, 3, generator)
        verified = verify_residual(tree, lambda node: p.log(), generator)
        emitted = tree.tokens[verified.path].tolist() or [verified.token]
        counts[(emitted[0],)] += 1
        first += verified.path == [1]
    chances = {(token,): chance for token, chance in enumerate(p.tolist())}
    if (p > 0).sum() > 1:
        assert pvalue(counts, chances) > 1e-3
    else:
        assert counts == {(0,): draws}
    # The first child is accepted as often as p and q overlap.
    overlap = float(torch.minimum(p, q).sum())
    assert abs(first / draws - overlap) <= 4 * math.sqrt(overlap * (1 - overlap) / draws) + 1e-9


def test_equal_distributions_leave_no_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest uniform rejects where p is a rounding below q. Nothing is left to divide by: p stays."""
    monkeypatch.setattr("t2iprobe.llm.engine.verification._draw_uniform", lambda generator: 1 - 2.0**-53)
    rounded = P.numpy() * np.array([1, 1, 1 - 1e-13, 1])
    child, p = _try_children({2: 1}, rounded, P.numpy().copy(), torch.Generator())
    assert child is None
    assert np.array_equal(p, rounded)


def test_the_smallest_uniform_accepts_no_filtered_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2iprobe.llm.engine.verification._draw_uniform", lambda generator: 0.0)
    tree = star(torch.tensor([1.0, 0.0]), 1, torch.Generator())
    verified = verify_residual(tree, lambda node: torch.tensor([0.0, 1.0]).log(), torch.Generator())
    assert (verified.path, verified.token) == ([], 1)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_a_token_without_probability_is_never_drawn(uniform: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2iprobe.llm.engine.verification._draw_uniform", lambda generator: uniform)
    draw = make_draw(Sampling(temperature=1.0), torch.Generator())
    for weights in ([0, 1, 0, 2, 0], [0, 0, 1 / 3, 0.1, 0], [0, 1e-9, 0, 0, 0], [0, 1.1, 0.7, 0.3, 0]):
        log_p = torch.tensor(weights, dtype=torch.float64).log()
        assert weights[draw(log_p)] > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_filters_that_leave_nothing_are_told(temperature: float) -> None:
    generator = torch.Generator()
    draw = make_draw(Sampling(temperature=temperature), generator)
    for log_p in (torch.full((4,), -math.inf), torch.full((4,), math.nan)):
        with pytest.raises(UserError, match="forbid every next token"):
            draw(log_p)
        with pytest.raises(UserError, match="forbid every next token"):
            verify_residual(star(P, 2, generator), lambda node, log_p=log_p: log_p, generator)


def test_each_verifier_refuses_the_others_tree() -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="deterministic trees only"):
        verify_match(star(P, 2, generator), lambda node: P.log(), make_draw(Sampling(), generator))
    with pytest.raises(ValueError, match="drawn at random only"):
        verify_residual(make_tree([0, 1], [-1, 0]), lambda node: P.log(), generator)

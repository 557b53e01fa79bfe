import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from language_toys import VOCABULARY, blur, make_toy, write_plainly

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.engine.drafts import LookupDraft, ModelDraft
from t2iprobe.llm.engine.generation import Trees, generate
from t2iprobe.llm.engine.processing import Sampling
from t2iprobe.llm.engine.sizing import Acceptance, MeasuredSizer, PassTimes

PROMPTS = [torch.tensor(ids) for ids in ([5, 7, 9, 11], [3], [8, 2, 30, 30, 4, 9, 12])]
TREES = [
    Trees("best-first", 12),
    Trees("best-first", 40, depth=3),
    Trees("optimal", 12),
    Trees("chain", 5),
    Trees("none"),
    Trees("best-first", 0),
]


def make_drafts(target: Any) -> dict[str, Callable[[], Any]]:
    return {
        "good": lambda: ModelDraft(Decoder(blur(target))),
        "bad": lambda: ModelDraft(Decoder(make_toy(9))),
        "itself": lambda: ModelDraft(Decoder(target)),
        "padded": lambda: ModelDraft(Decoder(make_toy(9, vocabulary=VOCABULARY + 8)), VOCABULARY),
        "cut": lambda: ModelDraft(Decoder(make_toy(9, vocabulary=VOCABULARY - 20)), VOCABULARY),
        "lookup": lambda: LookupDraft(VOCABULARY),
        "none": lambda: None,
    }


@pytest.mark.parametrize("name", ["good", "bad", "itself", "padded", "cut", "lookup", "none"])
def test_greedy_text_is_the_targets_own(name: str) -> None:
    target = make_toy()
    wanted = [write_plainly(target, prompt, 25) for prompt in PROMPTS]
    for trees in TREES:
        draft = make_drafts(target)[name]()
        found = generate(Decoder(target), draft, PROMPTS, trees=trees, max_new_tokens=25)
        assert [each.token_ids for each in found] == wanted, trees
        assert all(sum(each.rounds) == 25 for each in found)
        if name == "itself" and trees.growth == "chain":
            assert all(each.rounds[0] == 6 for each in found)
        if trees.growth == "none" or name == "none":
            assert all(each.target_passes == 25 and each.draft_passes == 0 for each in found)


def test_a_padded_vocabulary_changes_no_guess() -> None:
    target, padded = make_toy(), make_toy(vocabulary=VOCABULARY + 8)
    kept = {name: weight for name, weight in target.state_dict().items() if weight.shape[:1] != (VOCABULARY,)}
    padded.load_state_dict(kept, strict=False)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        padded.get_parameter(name)[:VOCABULARY] = target.get_parameter(name)
        padded.get_parameter(name)[VOCABULARY:] *= 9  # guessed, if they could be
    trees = Trees("chain", 5)
    draft = ModelDraft(Decoder(padded), VOCABULARY)
    (made,) = generate(Decoder(target), draft, PROMPTS[:1], trees=trees, max_new_tokens=24)
    assert made.rounds == [6] * 4


def test_a_good_draft_saves_passes() -> None:
    target = make_toy()
    draft = ModelDraft(Decoder(blur(target, 0.02)))
    (tree,) = generate(Decoder(target), draft, PROMPTS[:1], trees=Trees("best-first", 24), max_new_tokens=60)
    assert tree.tokens_per_pass > 3
    assert tree.draft_passes > tree.target_passes


def test_caches_grow_as_needed_and_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2iprobe.llm.engine.generation.ROOM", 4)
    target = make_toy()
    draft, capacities = ModelDraft(Decoder(blur(target))), []
    decoder = Decoder(target)
    monkeypatch.setattr(
        decoder, "new_cache", lambda b, c: capacities.append(c) or Decoder.new_cache(decoder, b, c)
    )
    for most in (90, 10**9):
        with contextlib.suppress(KeyboardInterrupt):
            (made,) = generate(
                decoder, draft, PROMPTS[:1], trees=Trees("best-first", 9), max_new_tokens=most,
                on_tokens=None if most == 90 else interrupt,
            )  # fmt: skip
        assert capacities.pop() == 4 + 4 + 64
        assert draft._cache.nbytes == 0
        assert draft._texts == []
    assert made.token_ids == write_plainly(target, PROMPTS[0], 90)


def interrupt(row: int, tokens: list[int]) -> None:
    raise KeyboardInterrupt


def test_a_batch_is_its_prompts_alone_sampled_too() -> None:
    target = make_toy()
    for growth in ("best-first", "optimal", "chain"):
        sampling = Sampling(temperature=1.3, top_p=0.9, seed=4)
        trees = Trees(growth, 8, acceptance=[0.5, 0.2])

        def write(prompts: list[torch.Tensor], trees: Trees = trees, sampling: Sampling = sampling) -> Any:
            draft = ModelDraft(Decoder(blur(target)))
            return generate(Decoder(target), draft, prompts, trees=trees, sampling=sampling, max_new_tokens=9)

        together = write(PROMPTS)
        assert together[0].token_ids == write(PROMPTS[:1])[0].token_ids
        assert together[0].token_ids != together[1].token_ids
        assert write(PROMPTS)[2].token_ids == together[2].token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("name", ["good", "bad", "lookup", "none"])
def test_ended_texts_take_no_rows_of_later_passes(
    name: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, eos = make_toy(), [7, 22, 30]
    prompts = [*PROMPTS, torch.tensor([12, 4]), torch.tensor([20, 21, 22, 23, 24])]
    sampling = Sampling(temperature=temperature, repetition_penalty=1.2, seed=3)
    for trees in TREES[:5]:

        def write(decoder: Decoder, prompts: list[torch.Tensor], first: int, trees: Trees = trees) -> Any:
            draft = make_drafts(target)[name]()
            return generate(
                decoder, draft, prompts, sampling=sampling, trees=trees, max_new_tokens=40,
                eos_token_ids=eos, first=first,
            )  # fmt: skip

        decoder, rows = Decoder(target), []
        monkeypatch.setattr(
            decoder, "forward", lambda *each, rows=rows, own=decoder.forward, **more: (
                rows.append(len(each[0])) or own(*each, **more)
            ),
        )  # fmt: skip
        together = write(decoder, prompts, 0)
        alone = [write(Decoder(target), [prompt], number)[0] for number, prompt in enumerate(prompts)]
        assert [made.token_ids for made in together] == [made.token_ids for made in alone]
        assert [made.rounds for made in together] == [made.rounds for made in alone]
        passes = [made.target_passes for made in together]
        assert len(set(passes)) > 1
        assert rows == [sum(each > number for each in passes) for number in range(max(passes))]


def test_a_draft_of_a_shorter_context_guesses_as_long_as_it_can() -> None:
    target, limited = make_toy(), make_toy()
    wanted = write_plainly(target, PROMPTS[0], 60)
    limited.config.max_position_embeddings = 30
    for trees in TREES[:4]:
        draft, drawn = ModelDraft(Decoder(limited)), []
        (made,) = generate(
            Decoder(target), draft, PROMPTS[:1], trees=trees, max_new_tokens=60,
            on_tokens=lambda _, tokens, drawn=drawn, draft=draft: drawn.append((len(tokens), draft.passes)),
        )  # fmt: skip
        assert made.token_ids == wanted
        lengths = [len(PROMPTS[0])]
        for count, _ in drawn:
            lengths.append(lengths[-1] + count)
        asked = [passes for _, passes in drawn]
        first = next(place for place, length in enumerate(lengths) if length > 30)
        assert asked[first - 1] == asked[-1]  # nobody asks it any more
        assert sorted(set(asked[:first])) == asked[:first]
        assert 31 <= lengths[first] <= 32  # to the very end of its context
        assert all(count == 1 for count, _ in drawn[first:])
    (made,) = generate(Decoder(target), ModelDraft(Decoder(limited)), [torch.arange(31)], max_new_tokens=5)
    assert made.draft_passes == 0


def test_each_pass_over_a_long_prompt_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("generation", "decoder"):
        monkeypatch.setattr(f"t2iprobe.llm.engine.{module}.CHUNK", 8)
    target, prompt = make_toy(), torch.arange(40) % VOCABULARY
    decoder, draft = Decoder(target), ModelDraft(Decoder(blur(target)))
    (made,) = generate(decoder, draft, [prompt], trees=Trees("chain", 3), max_new_tokens=9)
    assert made.token_ids == write_plainly(target, prompt, 9)
    assert made.target_passes == decoder.passes == len(made.rounds) + 5  # 39 tokens in passes of 8
    assert made.draft_passes == draft.decoder.passes >= 5


def test_text_ends_where_it_should() -> None:
    target = make_toy()
    plain = write_plainly(target, PROMPTS[0], 30)
    for trees in TREES:
        draft = ModelDraft(Decoder(target))
        end = plain[11]
        (made,) = generate(
            Decoder(target), draft, PROMPTS[:1], trees=trees, max_new_tokens=30, eos_token_ids=[end]
        )
        assert made.token_ids == plain[: plain.index(end) + 1]
        assert made.stop_reason == "eos"
        for most in (1, 2, 7):
            draft = ModelDraft(Decoder(target))
            (made,) = generate(Decoder(target), draft, PROMPTS[:1], trees=trees, max_new_tokens=most)
            assert (made.token_ids, made.stop_reason) == (plain[:most], "length")


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(ord("A") + token) for token in tokens)


def test_stop_strings_span_tokens_and_are_cut() -> None:
    target = make_toy()
    plain = write_plainly(target, PROMPTS[0], 30)
    text = Letters().decode(plain)
    stop = text[9:12]
    for trees in TREES:
        (made,) = generate(
            Decoder(target), ModelDraft(Decoder(target)), PROMPTS[:1], trees=trees, max_new_tokens=30,
            stop=["??", stop], tokenizer=Letters(),
        )  # fmt: skip
        assert made.text == text[: text.index(stop)]
        assert made.token_ids == plain[: text.index(stop) + 3]
        assert made.stop_reason == "stop"


def test_the_context_ends_a_text() -> None:
    target = make_toy()
    prompt = torch.arange(250) % VOCABULARY
    (made,) = generate(Decoder(target), ModelDraft(Decoder(target)), [prompt], max_new_tokens=50)
    assert made.stop_reason == "context"
    assert made.token_ids == write_plainly(target, prompt, 6)


def test_penalties_follow_each_nodes_own_path() -> None:
    target = make_toy()
    sampling = Sampling(repetition_penalty=1.7, no_repeat_ngram=2)
    plain = generate(Decoder(target), None, PROMPTS, sampling=sampling, max_new_tokens=25)
    for trees, draft in itertools.product(TREES[:4], ("good", "itself", "lookup")):
        found = generate(
            Decoder(target),
            make_drafts(target)[draft](),
            PROMPTS,
            sampling=sampling,
            trees=trees,
            max_new_tokens=25,
        )
        assert [each.token_ids for each in found] == [each.token_ids for each in plain]
    assert [each.token_ids for each in plain] != [write_plainly(target, prompt, 25) for prompt in PROMPTS]


@pytest.mark.parametrize("growth", ["best-first", "optimal", "chain"])
def test_sampled_text_has_the_targets_distribution(growth: str) -> None:
    """All three tokens together, over many prompts in a batch: a chi-square against the exact joint."""
    target, vocabulary = make_toy(3, layers=1, sharpness=1.0, vocabulary=5), 5
    draft = ModelDraft(Decoder(make_toy(4, layers=1, sharpness=1.0, vocabulary=5)))
    prompt, count, batches = torch.tensor([2, 4]), 3, 20
    exact = np.zeros((vocabulary,) * count)
    for tokens in itertools.product(range(vocabulary), repeat=count):
        text = torch.cat([prompt, torch.tensor(tokens)])
        p = target(text[None]).logits[0, 1:-1].softmax(-1)
        exact[tokens] = p[torch.arange(count), list(tokens)].prod()
    counts = np.zeros_like(exact)
    for seed in range(batches):
        found = generate(
            Decoder(target), draft, [prompt] * 200, sampling=Sampling(temperature=1.0, seed=seed),
            trees=Trees(growth, 4), max_new_tokens=count,
        )  # fmt: skip
        for made in found:
            counts[tuple(made.token_ids)] += 1
    expected = exact * counts.sum()
    from scipy.stats import chi2

    kept = expected > 5
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi2.sf(statistic, kept.sum() - 1) > 1e-3


def test_the_sizer_chooses_and_plain_decoding_wins_where_trees_cost_too_much() -> None:
    target = make_toy()
    wanted = write_plainly(target, PROMPTS[0], 25)
    for slope, budget in ((3.0, 0), (0.001, 32)):
        times = PassTimes({n: 1 + slope * n for n in (1, 2, 3, 5, 9, 17, 33)}, {1: 0.01, 64: 0.02})
        sizer = MeasuredSizer(times)
        (made,) = generate(
            Decoder(target),
            ModelDraft(Decoder(blur(target))),
            PROMPTS[:1],
            trees=Trees(budget=sizer),
            max_new_tokens=25,
        )
        assert made.token_ids == wanted
        assert sizer.choose(Acceptance())[0] == budget
        assert (made.draft_passes == 0) == (budget == 0)


def test_prompts_that_share_a_pass_have_smaller_trees() -> None:
    # Free up to 16 tokens, then each costs: one prompt fills them with guesses, sixteen have none to spare.
    times = PassTimes({n: 1 + max(0, n - 16) / 4 for n in (1, 2, 4, 8, 16, 32, 64, 128)}, {1: 0, 128: 0})
    eight = times.shared(8)
    assert max(eight.target) == 16
    assert {n: eight.target[n] for n in (1, 2, 4, 8)} == {1: 1, 2: 1, 4: 5, 8: 13}
    chosen = [MeasuredSizer(times.shared(prompts)).choose(Acceptance())[0] for prompts in (1, 8, 16, 500)]
    assert chosen[0] > chosen[1] == 1
    assert chosen[2:] == [0, 0]


def test_acceptance_is_learned_also_from_narrow_trees() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([0.5, 0.2, 0.1])
    from t2iprobe.llm.engine.tree import make_tree

    learned = Acceptance()
    for _ in range(20_000):
        children = rng.integers(1, 4)
        tree = make_tree([0, *range(1, children + 1)], [-1] + [0] * children)
        rank = rng.choice(4, p=[*truth, 1 - truth.sum()])
        learned.update(tree, [rank + 1] if rank < children else [])
    assert learned.vector()[:3] == pytest.approx(truth, abs=0.015)
    assert learned.vector().sum() <= 1


def test_bad_input_is_told() -> None:
    target = Decoder(make_toy())
    for prompts, match in (
        ([torch.tensor([], dtype=torch.int64)], "empty prompt"),
        ([torch.tensor([1, VOCABULARY])], "vocabulary of 40 lacks"),
        ([torch.zeros(256, dtype=torch.int64)], "256 tokens and the model's context ends at 256"),
    ):
        with pytest.raises(UserError, match=match):
            generate(target, None, prompts)
    with pytest.raises(UserError, match="12 tokens and the target 40"):
        generate(target, ModelDraft(Decoder(make_toy(vocabulary=12))), PROMPTS)
    with pytest.raises(UserError, match="knows no distribution"):
        generate(target, LookupDraft(VOCABULARY), PROMPTS, trees=Trees("chain", verifier="residual"))
    with pytest.raises(UserError, match="there is no tree 'bush'"):
        Trees("bush")
    with pytest.raises(UserError, match="best-first trees are deterministic"):
        Trees("best-first", verifier="residual")
    with pytest.raises(UserError, match="need the tokenizer"):
        generate(target, None, PROMPTS, stop=["x"])
    with pytest.raises(UserError, match="an empty stop string would end every text"):
        generate(target, None, PROMPTS, stop=["x", ""], tokenizer=Letters())

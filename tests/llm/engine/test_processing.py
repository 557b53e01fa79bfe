from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import logits_process as hf

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.processing import REPLAYABLE, Processing, Sampling

FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram": {"no_repeat_ngram": 2},
    "all": {
        "temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3,
        "no_repeat_ngram": 2,
    },
}  # fmt: skip


def reference(logits: torch.Tensor, path: torch.Tensor, **settings: Any) -> torch.Tensor:
    """One node's log-probabilities, by Transformers' own classes one after the other."""
    scores = logits[None]
    for name, make in (
        ("repetition_penalty", hf.RepetitionPenaltyLogitsProcessor),
        ("no_repeat_ngram", hf.NoRepeatNGramLogitsProcessor),
        ("temperature", hf.TemperatureLogitsWarper),
        ("top_k", hf.TopKLogitsWarper),
        ("top_p", hf.TopPLogitsWarper),
        ("min_p", hf.MinPLogitsWarper),
    ):
        if name in settings:
            scores = make(settings[name])(path[None], scores)
    return scores[0].double().log_softmax(-1)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filters_equal_transformers_on_random_logits(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(12, 50, dtype=dtype, generator=generator)
    before = logits.clone()
    # Paths of three lengths, in no order, of few tokens, so that pairs come again.
    paths = [torch.randint(6, (8 + row % 3,), generator=generator) for row in range(12)]
    processing = Processing(Sampling(**{"temperature": 1.0, **FILTERS[name]}))
    together = processing(logits, paths)
    assert torch.equal(logits, before)
    assert together.dtype == torch.float64
    for row, path in enumerate(paths):
        expected = reference(logits[row], path, **FILTERS[name])
        assert torch.equal(together[row], expected)
        assert torch.equal(processing(logits[row], [path]), expected)
        assert float(expected.exp().sum()) == pytest.approx(1, abs=1e-12)
    if name != "plain":
        assert not torch.equal(together, before.double().log_softmax(-1))


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("greedy", [False, True])
def test_the_order_is_that_of_generate(name: str, greedy: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.6, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    settings = {"top_k": 0, **FILTERS[name]}
    options = {("no_repeat_ngram_size" if k == "no_repeat_ngram" else k): v for k, v in settings.items()}
    bias = hf.SequenceBiasLogitsProcessor([[[5], 3.0], [[7], -2.0]])
    if greedy:
        options = {k: v for k, v in options.items() if k in ("repetition_penalty", "no_repeat_ngram_size")}
    output = model.generate(
        torch.tensor([[3, 4, 3, 9]]), attention_mask=torch.ones(1, 4), do_sample=not greedy, max_new_tokens=8,
        logits_processor=hf.LogitsProcessorList([bias]), output_logits=True, output_scores=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    processing = Processing(
        Sampling(**{"temperature": 1.0, **settings, **({"temperature": 0.0} if greedy else {})}), [bias]
    )
    for step, (logits, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
        path = output.sequences[0, : 4 + step]
        assert torch.equal(processing(logits, [path]), scores.double().log_softmax(-1))


def test_greedy_ignores_the_filters_but_not_the_penalties() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    path = torch.tensor([1, 2, 3])
    plain = Processing(Sampling())(logits, [path])
    assert torch.equal(Processing(Sampling(top_k=3, top_p=0.2, min_p=0.5))(logits, [path]), plain)
    assert torch.equal(plain, logits.double().log_softmax(-1))
    penalised = Processing(Sampling(repetition_penalty=2.0))(logits, [path])
    assert torch.equal(penalised[0], reference(logits[0], path, repetition_penalty=2.0))


def test_logits_that_nearly_tie_stay_apart() -> None:
    # A log-softmax in float32 makes them equal, and the first would win.
    logits = torch.zeros(50_000)
    logits[[7, 9]] = torch.tensor([1e-9, 2e-9])
    assert logits.log_softmax(-1).argmax() != 9
    assert Processing(Sampling())(logits, []).argmax() == 9


def test_half_precision_is_processed_in_single() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = Processing(Sampling(temperature=0.7))(logits, [])
    assert torch.equal(found, (logits.float() / 0.7).double().log_softmax(-1))


def test_every_processor_on_the_list_is_replayable() -> None:
    """Asked about many paths together, twice and in another order, each answers as it does alone."""
    made: dict[str, Any] = {
        "EncoderNoRepeatNGramLogitsProcessor": (2, torch.tensor([[1, 2, 3]])),
        "EncoderRepetitionPenaltyLogitsProcessor": (1.5, torch.tensor([[1, 2]])),
        "EpsilonLogitsWarper": (0.03,),
        "EtaLogitsWarper": (0.03,),
        "ExponentialDecayLengthPenalty": ((1, 1.5), 3, 2),
        "ForcedBOSTokenLogitsProcessor": (4,),
        "ForcedEOSTokenLogitsProcessor": (6, 3),
        "InfNanRemoveLogitsProcessor": (),
        "LogitNormalization": (),
        "MinLengthLogitsProcessor": (5, 3),
        "MinNewTokensLengthLogitsProcessor": (2, 3, 3),
        "MinPLogitsWarper": (0.1,),
        "NoBadWordsLogitsProcessor": ([[1, 2], [4]],),
        "NoRepeatNGramLogitsProcessor": (2,),
        "RepetitionPenaltyLogitsProcessor": (1.5, 1),
        "SequenceBiasLogitsProcessor": ([[[1, 2], 2.0]],),
        "SuppressTokensAtBeginLogitsProcessor": ([2], 5),
        "SuppressTokensLogitsProcessor": ([2],),
        "TemperatureLogitsWarper": (0.5,),
        "TopHLogitsWarper": (0.5,),
        "TopKLogitsWarper": (4,),
        "TopPLogitsWarper": (0.5,),
        "TypicalLogitsWarper": (0.5,),
    }
    assert made.keys() == REPLAYABLE
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(9, 12, generator=generator)
    paths = [torch.randint(6, (4 + row % 3,), generator=generator) for row in range(9)]
    for name, arguments in made.items():
        alone = torch.cat(
            [
                getattr(hf, name)(*arguments)(path[None], row[None].clone())
                for path, row in zip(paths, logits, strict=True)
            ]
        )
        processing = Processing(Sampling(), [getattr(hf, name)(*arguments)])
        for order in (torch.arange(9), torch.randperm(9, generator=generator)):
            found = processing(logits[order], [paths[row] for row in order])
            torch.testing.assert_close(found, alone[order].double().log_softmax(-1), rtol=0, atol=1e-6)


class OwnTopK(hf.TopKLogitsWarper):
    pass


@pytest.mark.parametrize(
    "processor",
    [
        hf.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, None),
        hf.PrefixConstrainedLogitsProcessor(lambda batch, sent: [1], 1),
        hf.WatermarkLogitsProcessor(40, "cpu"),
        OwnTopK(3),
        lambda ids, scores: scores,
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_what_cannot_be_replayed_is_refused_by_name(processor: Any) -> None:
    with pytest.raises(UserError, match=f"processor {type(processor).__name__} cannot be replayed"):
        Processing(Sampling(), [processor])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("no_repeat_ngram", -1),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}: it must be "):
        Sampling(**{name: value})  # type: ignore[arg-type]

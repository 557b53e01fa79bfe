"""Log-probabilities against one plain forward a text, whatever shares the pass."""

import numpy as np
import pytest
import torch
from decoder_toys import FAMILIES, random_tokens, tiny_model
from language_toys import make_toy

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.scoring import Request, count_rows, score_continuations


def score_plainly(model, context, continuation):
    logits = model(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(-1)
    rows = logits[len(context) - 1 : -1]
    tokens = torch.tensor(continuation)
    values = rows[torch.arange(len(tokens)), tokens]
    return values.detach().numpy(), bool((rows.argmax(-1) == tokens).all())


def make_requests() -> list[Request]:
    """A header that all share, pairs that share more, one text twice, one apart, one token each."""
    header = random_tokens(9).tolist()
    requests: list[Request] = [
        (header + random_tokens(5, seed=text).tolist(), random_tokens(3, seed=100 + label).tolist())
        for text in range(4)
        for label in range(3)
    ]
    return [
        *requests,
        requests[0],
        (random_tokens(6, seed=9).tolist(), random_tokens(7).tolist()),
        ([3], [4]),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_plain_forwards(family: str) -> None:
    model = tiny_model(family)
    decoder, requests = Decoder(model), make_requests()
    wanted = [score_plainly(model, *request) for request in requests]
    for rows in (10, 40, 1000):
        for score, (values, is_greedy) in zip(
            score_continuations(decoder, requests, rows=rows), wanted, strict=True
        ):
            # GPT-NeoX and Gemma compute softmax in float32.
            np.testing.assert_allclose(score.log_probabilities, values, atol=2e-4)
            assert score.is_greedy == is_greedy
            assert score.total == pytest.approx(values.sum(), abs=1e-3)
            assert score.mean == pytest.approx(values.mean(), abs=1e-3)


def test_greedy_text_is_known_as_such() -> None:
    model = make_toy()
    text = [5, 6, 7]
    made: list[int] = []
    for _ in range(4):
        made.append(int(model(torch.tensor([text + made])).logits[0, -1].argmax()))
    (score, other) = score_continuations(Decoder(model), [(text, made), (text, [*made[:-1], 3])])
    assert score.is_greedy
    assert not other.is_greedy


def test_beginnings_are_computed_once() -> None:
    header = list(range(3, 23))
    requests: list[Request] = [(header, [5, token]) for token in range(6, 12)]
    assert count_rows(requests) == 21  # the header and the 5 that all share: last tokens are only predicted
    decoder = Decoder(make_toy())
    score_continuations(decoder, requests)
    assert decoder.passes == 1
    score_continuations(decoder, [([token, *header], [5]) for token in range(3, 13)], rows=50)
    assert decoder.passes == 6  # two texts of 21 rows a pass


def test_a_long_text_loses_its_beginning() -> None:
    model = make_toy()  # of 256 tokens
    tokens = random_tokens(300).tolist()
    (score,) = score_continuations(Decoder(model), [(tokens[:290], tokens[290:])])
    wanted, _ = score_plainly(model, tokens[43:290], tokens[290:])
    np.testing.assert_allclose(score.log_probabilities, wanted, atol=1e-9)


def test_progress_is_told_and_nothing_is_refused_by_name() -> None:
    told: list[tuple[int, int]] = []
    decoder = Decoder(make_toy())
    score_continuations(
        decoder, make_requests(), rows=20, show=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (15, 15)
    assert len(told) > 1
    assert score_continuations(decoder, []) == []
    for request in (([], [3]), ([3], [])):
        with pytest.raises(UserError, match="an empty text"):
            score_continuations(decoder, [request])

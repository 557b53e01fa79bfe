"""The rows train beside a vocabulary that stays byte for byte what it was."""

from pathlib import Path

import pytest
import torch

from t2iprobe.errors import UserError
from t2iprobe.inversion.backbones import make_backbone
from t2iprobe.inversion.embeddings import Rows, check_token, spell_tokens
from t2iprobe.testing import tiny_pipeline

FAMILIES = ("sd", "sdxl", "ldm", "flux")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_stand_for_their_tokens_and_leave_without_a_trace(family: str) -> None:
    backbone = make_backbone(tiny_pipeline(family))
    before = {
        name: (len(tokenizer), encoder.get_input_embeddings().weight.clone(), tokenizer("a <cat>").input_ids)
        for name, (tokenizer, encoder) in backbone.encoders.items()
    }
    rows = Rows(backbone.encoders, {"<cat>": 2, "<dog>": 1})
    assert rows.expand("a <cat> and <dog>.") == "a <cat> <cat>#1 and <dog>."
    for name, (tokenizer, encoder) in backbone.encoders.items():
        first = before[name][0]
        ids = tokenizer(rows.expand("<dog> <cat>"), add_special_tokens=False).input_ids
        assert ids == [first + 2, first, first + 1]
        values = torch.randn(2, before[name][1].shape[1])
        with torch.no_grad():
            rows.parameters("<cat>")[name].copy_(values)
        looked_up = encoder.get_input_embeddings()(torch.tensor([[first, 5, first + 1]]))[0]
        assert torch.equal(looked_up, torch.stack([values[0], before[name][1][5], values[1]]))
    rows.remove()
    for name, (tokenizer, encoder) in backbone.encoders.items():
        count, weight, ids = before[name]
        assert len(tokenizer) == count
        assert encoder.get_input_embeddings().weight.equal(weight)
        assert tokenizer("a <cat>").input_ids == ids


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_rows_get_a_gradient(family: str) -> None:
    backbone = make_backbone(tiny_pipeline(family))
    rows = Rows(backbone.encoders, {"<cat>": 1, "<dog>": 1})
    for token in rows.tokens:
        rows.set(token, rows.at_random(token, torch.Generator().manual_seed(0)))
    sum(value.float().square().sum() for value in backbone.encode(["a <cat>"]).values()).backward()
    for rows_of_encoder in rows.parameters("<cat>").values():
        assert rows_of_encoder.dtype == torch.float32
        assert rows_of_encoder.grad.abs().sum() > 0
    for rows_of_encoder in rows.parameters("<dog>").values():
        assert rows_of_encoder.grad.abs().sum() == 0
    trained = {id(p) for token in rows.tokens for p in rows.parameters(token).values()}
    for _, encoder in backbone.encoders.values():
        assert all(p.grad is None for p in encoder.parameters() if id(p) not in trained)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a photo of a <my-cat>, close-up", "a photo of a my cat, close-up"),
        ("a <my-cat> <my-cat>#1 <my-cat>#2, a well-known one", "a my cat, a well-known one"),
        ("<c3-p.o> <c3-p.o>#1's friends < 3", "c3 p.o's friends < 3"),
    ],
)
def test_tokens_are_spelled_and_the_rest_stays(prompt: str, words: str) -> None:
    assert spell_tokens(prompt) == words


def test_fluxs_t5_reads_the_same_words_in_training_and_in_drawing() -> None:
    backbone = make_backbone(tiny_pipeline("flux"))
    prompt, words = "a <my-cat> <my-cat>#1, close-up", "a my cat, close-up"
    drawn = backbone.pipeline.encode_prompt(prompt, None, max_sequence_length=77)[0]
    plain = tiny_pipeline("flux").encode_prompt(words, None, max_sequence_length=77)[0]
    assert torch.allclose(drawn, plain, atol=1e-4)
    assert torch.allclose(backbone.encode([prompt])["text"], plain, atol=1e-4)


def claim_id_two(encoder: torch.nn.Module) -> None:
    """Let a CLIP say what the published configurations of SDXL and Flux say: that texts end with id 2."""
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = module.config.eos_token_id = 2


@pytest.mark.parametrize(("family", "part"), [("sdxl", "text_embeds"), ("flux", "pooled")])
def test_texts_are_pooled_at_their_end_and_not_at_the_token(family: str, part: str) -> None:
    backbone = make_backbone(tiny_pipeline(family))
    plain = backbone.encode(["a cat"])[part]
    for _, encoder in backbone.encoders.values():
        claim_id_two(encoder)
    rows = Rows(backbone.encoders, {"<cat>": 1})
    rows.set("<cat>", rows.at_random("<cat>", torch.Generator().manual_seed(0)))
    one, other = backbone.encode(["a <cat>, close-up", "a <cat> xxxx yyyy"])[part]
    assert not torch.allclose(one, other, atol=1e-3)  # the token reads nothing that stands behind it
    rows.remove()
    assert torch.equal(backbone.encode(["a cat"])[part], plain)


def test_words_are_shared_out_over_the_rows() -> None:
    backbone = make_backbone(tiny_pipeline("sd"))
    tokenizer, encoder = backbone.encoders["clip_l"]
    matrix = encoder.get_input_embeddings().weight
    ids = tokenizer("abc de", add_special_tokens=False).input_ids  # its tokens are single letters
    assert len(ids) == 5
    rows = Rows(backbone.encoders, {"<one>": 1, "<two>": 2, "<many>": 7})
    assert torch.allclose(rows.from_words("<one>", ["abc", "de"])["clip_l"], matrix[ids].mean(0, True))
    two = rows.from_words("<two>", ["abc", "de"])["clip_l"]
    assert torch.allclose(two, torch.stack([matrix[ids[:3]].mean(0), matrix[ids[3:]].mean(0)]))
    many = rows.from_words("<many>", ["abc", "de"])["clip_l"]
    assert torch.equal(many, matrix[[*ids, *ids[:2]]])


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("<my cat>", "contains a space"),
        ("<Cat>", "lower-case"),
        ("cat", "is not <name>"),
        ("<cat", "is not <name>"),
        ("<>", "is not <name>"),
        ("<a> b", "contains a space"),
    ],
)
def test_a_token_that_prompts_could_not_hold_is_refused(token: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_token(token, [])


def test_a_token_that_exists_or_begins_another_is_refused() -> None:
    with pytest.raises(UserError, match="exists"):
        check_token("<cat>", ["a", "<cat>"])
    with pytest.raises(UserError, match="one begins the other"):
        check_token("<cat>", ["<cat>s"])
    backbone = make_backbone(tiny_pipeline("sd"))
    backbone.encoders["clip_l"][0].add_tokens(["<cat>"])
    with pytest.raises(UserError, match="<cat> exists"):
        Rows(backbone.encoders, {"<cat>": 1})


def test_no_vectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one vector"):
        Rows(make_backbone(tiny_pipeline("sd")).encoders, {"<cat>": 0})

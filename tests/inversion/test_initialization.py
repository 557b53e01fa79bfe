"""Where the rows begin."""

from pathlib import Path
from typing import Any

import pytest
import torch

from t2iprobe.errors import UserError
from t2iprobe.inversion import initialization
from t2iprobe.inversion.backbones import make_backbone
from t2iprobe.inversion.concepts import encode_moments, load_concept
from t2iprobe.inversion.embeddings import Rows
from t2iprobe.inversion.initialization import initialise, list_words, nearest_words
from t2iprobe.inversion.objective import denoising_losses, draw_inputs
from t2iprobe.pipelines import Pipeline, load_pipeline
from t2iprobe.testing import tiny_pipeline

HARP = Path(__file__).parents[2] / "t2iprobe" / "assets" / "concepts" / "harp.n.01"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pipeline_with_words() -> Pipeline:
    """A tiny pipeline whose vocabulary has whole words."""
    pipeline = tiny_pipeline("sd")
    pipeline.tokenizer.add_tokens(["dog", "cow", "house"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    return pipeline


def test_random_rows_are_the_vocabularys_and_follow_the_seed(concept_folder: Path) -> None:
    backbone = make_backbone(tiny_pipeline("sd"))
    concept = load_concept(concept_folder, "<cat>", size=32)
    moments = encode_moments(backbone, concept)
    rows = Rows(backbone.encoders, {"<cat>": 500})
    drawn = []
    for seed in (0, 0, 1):
        assert initialise(backbone, rows, concept, moments, "random", seed)["how"] == "random"
        drawn.append(rows.vectors("<cat>")["clip_l"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    vocabulary = tiny_pipeline("sd").text_encoder.get_input_embeddings().weight
    assert torch.allclose(drawn[0].mean(0), vocabulary.mean(0), atol=0.2 * float(vocabulary.std()))
    assert float(drawn[0].std()) == pytest.approx(float(vocabulary.std()), rel=0.1)


def test_bad_words_are_told(concept_folder: Path) -> None:
    backbone = make_backbone(tiny_pipeline("sd"))
    concept = load_concept(concept_folder, "<cat>", size=32)
    rows = Rows(backbone.encoders, {"<cat>": 1})
    moments = encode_moments(backbone, concept)
    with pytest.raises(UserError, match="--init takes"):
        initialise(backbone, rows, concept, moments, " , ", 0)
    with pytest.raises(UserError, match="no whole words"):  # its tokens are bytes
        nearest_words(backbone, rows, concept, moments)


def test_the_nearest_word_is_the_one_that_denoises_best() -> None:
    backbone = make_backbone(load_pipeline("embedded", dtype="float32"))
    concept = load_concept(HARP, "<harp>", size=backbone.size, templates=["An image of a {}."])
    moments = encode_moments(backbone, concept)
    rows = Rows(backbone.encoders, {"<harp>": 1})
    ranked = nearest_words(backbone, rows, concept, moments, key="model")
    losses = [loss for _, loss in ranked]
    assert losses == sorted(losses)
    inputs = draw_inputs(concept, moments.mean.shape[2:], 8, (0, "nearest"))
    with torch.no_grad():
        word, loss = ranked[3]
        prompts = [caption.replace("<harp>", word) for caption in inputs.captions]
        assert float(denoising_losses(backbone, [moments], [inputs], prompts).mean()) == pytest.approx(
            loss, abs=1e-5
        )
    words = list_words(backbone.encoders["clip_l"][0])
    assert len(words) > 100
    assert set(dict(ranked)) <= set(words)
    again = nearest_words(backbone, rows, concept, moments, key="model")  # from the cache
    assert again == ranked
    found = initialise(backbone, rows, concept, moments, "nearest", 0, key="model")
    assert found["words"] == [ranked[0][0]]
    tokenizer, encoder = backbone.encoders["clip_l"]
    token = tokenizer(ranked[0][0], add_special_tokens=False).input_ids[0]
    expected = encoder.get_input_embeddings().weight[token]
    assert torch.allclose(rows.vectors("<harp>")["clip_l"][0], expected)


def test_the_nearest_words_depend_on_what_their_cache_is_named_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialization, "ROUNDS", ((8, 1), (4, 2)))
    pipeline = load_pipeline("embedded", dtype="float32")

    def rank(token: str = "<harp>", vectors: int = 1, dtype: str = "float32", key: str = "") -> list[Any]:
        backbone = make_backbone(pipeline, dtype=dtype)
        concept = load_concept(HARP, token, size=backbone.size, templates=["An image of a {}."])
        moments = encode_moments(backbone, concept)
        rows = Rows(backbone.encoders, {token: vectors})
        ranked = nearest_words(backbone, rows, concept, moments, key=key)
        rows.remove()
        return ranked

    one = rank(key="model")
    assert rank("<lyre>") == rank("<lyre>", key="model") == one
    cached = tmp_path / "cache" / "t2iprobe" / "nearest_words"
    assert len(list(cached.iterdir())) == 1
    rank(vectors=2, key="model")
    rank(dtype="bfloat16", key="model")
    assert len(list(cached.iterdir())) == 3


def test_nearest_words_are_those_of_unmirrored_pictures_where_none_is_mirrored(
    concept_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make_backbone(pipeline_with_words())
    concept = load_concept(concept_folder, "<cat>", size=32)
    moments = encode_moments(backbone, concept)
    rows = Rows(backbone.encoders, {"<cat>": 1})
    mirrored, original = [], initialization.denoising_losses

    def note(*given: Any) -> torch.Tensor:
        mirrored.append(any(bool(inputs.flips.any()) for inputs in given[2]))
        return original(*given)

    monkeypatch.setattr(initialization, "denoising_losses", note)
    found = []
    for flip in (True, False):
        found.append(nearest_words(backbone, rows, concept, moments, flip=flip, key="model"))
        assert any(mirrored) == flip
        mirrored.clear()
    assert found[0] != found[1]  # not from the cache


def test_nearest_words_are_found_item_by_item_where_the_memory_is_too_small(
    concept_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialization, "ROUNDS", ((2, 1), (1, 8)))  # fewer than there are words
    backbone = make_backbone(pipeline_with_words())
    concept = load_concept(concept_folder, "<cat>", size=32)
    moments = encode_moments(backbone, concept)
    rows = Rows(backbone.encoders, {"<cat>": 1})
    whole = nearest_words(backbone, rows, concept, moments)
    sizes = []

    def limit(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        sizes.append(len(given[0]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    backbone.denoiser.register_forward_pre_hook(limit)
    (parts,) = nearest_words(backbone, rows, concept, moments)
    assert parts == [whole[0][0], pytest.approx(whole[0][1], rel=1e-5)]
    assert max(sizes) == 8


@pytest.mark.slow
def test_one_of_the_best_words_of_all_is_found() -> None:
    """Of all words of the vocabulary, exhaustively judged, one of the five best is among those looked at."""
    backbone = make_backbone(load_pipeline("embedded", dtype="float32"))
    concept = load_concept(HARP, "<harp>", size=backbone.size, templates=["An image of a {}."])
    moments = encode_moments(backbone, concept)
    rows = Rows(backbone.encoders, {"<harp>": 1})
    looked_at = dict(nearest_words(backbone, rows, concept, moments))
    inputs = draw_inputs(concept, moments.mean.shape[2:], 8, (0, "nearest"))
    words = list_words(backbone.encoders["clip_l"][0])
    losses = {}
    with torch.no_grad():
        for start in range(0, len(words), 8):
            part = words[start : start + 8]
            prompts = [caption.replace("<harp>", word) for word in part for caption in inputs.captions]
            found = denoising_losses(backbone, [moments] * len(part), [inputs] * len(part), prompts)
            losses |= dict(zip(part, found.view(len(part), -1).mean(1).tolist(), strict=True))
    best = sorted(words, key=losses.__getitem__)[:5]
    assert set(best) & set(looked_at), (best, list(looked_at)[:5])

"""Where a token's rows begin: at words, at random, or at the word that is nearest to the pictures."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from t2iprobe.errors import UserError
from t2iprobe.inversion.backbones import Backbone
from t2iprobe.inversion.concepts import Concept, Moments
from t2iprobe.inversion.embeddings import Rows
from t2iprobe.inversion.memory import in_batches
from t2iprobe.inversion.objective import Inputs, denoising_losses, draw_inputs, make_generator
from t2iprobe.storage import write_atomically

# Successive halving: so many words are judged on so many fixed inputs each, the best go on.
ROUNDS = ((256, 1), (32, 4), (8, 8))
ITEMS = ROUNDS[-1][1]


def initialise(
    backbone: Backbone,
    rows: Rows,
    concept: Concept,
    moments: Moments,
    init: str,
    seed: int,
    flip: bool = True,
    key: str = "",
) -> dict[str, Any]:
    """Give a token's rows their first values and say how: {"how", "words"}.

    `init` is "nearest", "random" or words by commas; `flip` and `key` are those of `nearest_words`.
    Raises UserError where the vocabulary cannot spell the words.
    """
    token = concept.token
    if init == "random":
        rows.set(token, rows.at_random(token, make_generator(seed, token, "init")))
        return {"how": "random", "words": []}
    if init == "nearest":
        ranked = nearest_words(backbone, rows, concept, moments, seed, flip, key)
        rows.set(token, rows.from_words(token, [ranked[0][0]]))
        return {"how": "nearest", "words": [ranked[0][0]], "ranking": ranked[:8]}
    words = [word.strip() for word in init.split(",") if word.strip()]
    if not words:
        raise UserError("--init takes nearest, random, or words by commas")
    rows.set(token, rows.from_words(token, words))
    return {"how": "words", "words": words}


def list_words(tokenizer: Any) -> list[str]:
    """Return the words of three letters and more that are one token of a vocabulary, sorted."""
    words = set()
    for piece in tokenizer.get_vocab():
        # a word's end is marked in CLIP's vocabulary, a word's beginning in T5's, its middle in BERT's
        word = piece.removesuffix("</w>").removeprefix("▁")
        if word.isalpha() and word.isascii() and word.islower() and len(word) > 2:
            if len(tokenizer(word, add_special_tokens=False).input_ids) == 1:
                words.add(word)
    return sorted(words)


def nearest_words(
    backbone: Backbone,
    rows: Rows,
    concept: Concept,
    moments: Moments,
    seed: int = 0,
    flip: bool = True,
    key: str = "",
) -> list[list[Any]]:
    """Return [word, loss] of the vocabulary's words with which the model denoises the pictures best.

    Of a vocabulary larger than the first round (ROUNDS), that many words are chosen by a score of all: the
    loss's gradient at the words' mean, to first order. Their loss is computed on one fixed input, that of the
    best of them on more. `flip` mirrors half of the pictures. Whatever the token is called, the words are the
    same. Kept in the user's cache if `key`, which names the model, is given.
    """
    about = (ROUNDS, key, backbone.dtype, rows.tokens[concept.token], seed, flip)
    cache = _cache_file(concept, moments, about) if key else None
    if cache is not None:
        with contextlib.suppress(OSError, ValueError):  # missing or damaged: it is made again
            return json.loads(cache.read_text(encoding="utf-8"))
    words = list_words(next(iter(backbone.encoders.values()))[0])
    if not words:
        raise UserError("the model's vocabulary has no whole words: give --init random")
    inputs = draw_inputs(concept, moments.mean.shape[2:], ITEMS, (seed, "nearest"), flip=flip)
    chosen = words
    if len(words) > ROUNDS[0][0]:
        ranks = _rank_by_gradient(backbone, rows, concept, moments, inputs, words)
        chosen = [words[place] for place in ranks[: ROUNDS[0][0]]]
    for most, items in ROUNDS:
        losses = _word_losses(backbone, concept, moments, _spread(inputs, items), chosen[:most])
        order = sorted(range(len(losses)), key=losses.__getitem__)
        chosen, losses = [chosen[place] for place in order], [losses[place] for place in order]
    ranked: list[list[Any]] = [[word, loss] for word, loss in zip(chosen, losses, strict=True)]
    if not all(math.isfinite(loss) for loss in losses):
        raise UserError(
            "the model's loss on the pictures is not a number, with words that it knows: "
            "give --dtype float32, or another model"
        )
    if cache is not None:
        with contextlib.suppress(OSError):  # it can be done without
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, json.dumps(ranked).encode())
    return ranked


def _rank_by_gradient(
    backbone: Backbone, rows: Rows, concept: Concept, moments: Moments, inputs: Inputs, words: Sequence[str]
) -> list[int]:
    count = rows.tokens[concept.token]
    matrices = {
        name: torch.stack(
            [
                encoder.get_input_embeddings().weight[
                    tokenizer(word, add_special_tokens=False).input_ids
                ].float().mean(0)
                for word in words
            ]
        )
        for name, (tokenizer, encoder) in backbone.encoders.items()
    }  # fmt: skip
    rows.set(concept.token, {name: matrix.mean(0).expand(count, -1) for name, matrix in matrices.items()})
    parameters = rows.parameters(concept.token)

    def differentiate(places: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
        part = _take(inputs, torch.tensor(places))
        prompts = [rows.expand(caption) for caption in part.captions]
        loss = denoising_losses(backbone, [moments], [part], prompts).sum() / ITEMS
        return [torch.autograd.grad(loss, list(parameters.values()))]

    parts = in_batches(differentiate, range(ITEMS), ITEMS, backbone.device, "a picture's gradient")
    scores = torch.zeros(len(words), device=backbone.device)
    for name, *gradients in zip(parameters, *parts, strict=True):
        matrix = matrices[name]
        scores += (matrix - matrix.mean(0)) @ sum(gradients).float().sum(0)
    return scores.argsort().tolist()


def _spread(inputs: Inputs, items: int) -> Inputs:
    """Return that many of the inputs, evenly spread over the amounts of noise."""
    every = len(inputs.captions) / items
    return _take(inputs, inputs.quantiles.argsort()[((torch.arange(items) + 0.5) * every).long()])


def _take(inputs: Inputs, chosen: torch.Tensor) -> Inputs:
    return Inputs(
        pictures=inputs.pictures[chosen],
        flips=inputs.flips[chosen],
        latents=inputs.latents[chosen],
        noise=inputs.noise[chosen],
        captions=[inputs.captions[place] for place in chosen],
        quantiles=inputs.quantiles[chosen],
    )


@torch.no_grad()
def _word_losses(
    backbone: Backbone,
    concept: Concept,
    moments: Moments,
    inputs: Inputs,
    words: Sequence[str],
    batch: int = 64,
) -> list[float]:
    def judge(part: Sequence[tuple[str, Inputs]]) -> list[torch.Tensor]:
        chosen = [one for _, one in part]
        prompts = [one.captions[0].replace(concept.token, word) for word, one in part]
        return list(denoising_losses(backbone, [moments] * len(part), chosen, prompts))

    single = [_take(inputs, torch.tensor([place])) for place in range(len(inputs.captions))]
    pairs = [(word, one) for word in words for one in single]
    losses = in_batches(judge, pairs, batch, backbone.device, "a picture")
    return torch.stack(losses).view(len(words), -1).mean(1).tolist()


def _cache_file(concept: Concept, moments: Moments, about: tuple[Any, ...]) -> Path:
    digest = hashlib.sha256(f"{about}/{concept.captions or concept.templates}".encode())
    digest.update(concept.pictures.numpy().tobytes())
    digest.update(str(tuple(moments.mean.shape)).encode())
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return home / "t2iprobe" / "nearest_words" / f"{digest.hexdigest()[:24]}.json"

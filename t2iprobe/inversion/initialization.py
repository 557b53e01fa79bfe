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
from t2iprobe.inversion.objective import Inputs, denoising_losses, draw_inputs, make_generator
from t2iprobe.storage import write_atomically

CANDIDATES = 32  # words whose loss is computed, of all words that the gradient ranks
ITEMS = 8


def initialise(
    backbone: Backbone, rows: Rows, concept: Concept, moments: Moments, init: str, seed: int, key: str = ""
) -> dict[str, Any]:
    """Give a token's rows their first values and say how: {"how", "words"}.

    `init` is "nearest", "random" or words by commas; `key` names the model, for the cache of nearest words.
    Raises UserError where the vocabulary cannot spell the words.
    """
    token = concept.token
    if init == "random":
        rows.set(token, rows.at_random(token, make_generator(seed, token, "init")))
        return {"how": "random", "words": []}
    if init == "nearest":
        ranked = nearest_words(backbone, rows, concept, moments, seed, key)
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
    backbone: Backbone, rows: Rows, concept: Concept, moments: Moments, seed: int = 0, key: str = ""
) -> list[list[Any]]:
    """Return [word, loss] of the vocabulary's words with which the model denoises the pictures best.

    All words are ranked by the loss's gradient at their mean (one backward and one product), the best
    CANDIDATES then by the loss itself, on inputs that stay fixed. Kept in the user's cache if `key` is given.
    """
    cache = _cache_file(concept, moments, seed, key) if key else None
    if cache is not None:
        with contextlib.suppress(OSError, ValueError):  # missing or damaged: it is made again
            return json.loads(cache.read_text(encoding="utf-8"))
    words = list_words(next(iter(backbone.encoders.values()))[0])
    if not words:
        raise UserError("the model's vocabulary has no whole words: give --init random")
    inputs = draw_inputs(concept, moments.mean.shape[2:], ITEMS, (seed, concept.token, "nearest"))
    chosen = [words[i] for i in _rank_by_gradient(backbone, rows, concept, moments, inputs, words)]
    losses = _word_losses(backbone, concept, moments, inputs, chosen)
    order = sorted(range(len(chosen)), key=losses.__getitem__)
    ranked: list[list[Any]] = [[chosen[i], losses[i]] for i in order]
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
    prompts = [rows.expand(caption) for caption in inputs.captions]
    loss = denoising_losses(backbone, [moments], [inputs], prompts).mean()
    parameters = rows.parameters(concept.token)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    scores = torch.zeros(len(words), device=loss.device)
    for name, gradient in zip(parameters, gradients, strict=True):
        matrix = matrices[name]
        scores += (matrix - matrix.mean(0)) @ gradient.float().sum(0)
    return scores.argsort()[:CANDIDATES].tolist()


@torch.no_grad()
def _word_losses(
    backbone: Backbone,
    concept: Concept,
    moments: Moments,
    inputs: Inputs,
    words: Sequence[str],
    together: int = 8,
) -> list[float]:
    losses: list[float] = []
    for start in range(0, len(words), together):
        part = words[start : start + together]
        prompts = [caption.replace(concept.token, word) for word in part for caption in inputs.captions]
        found = denoising_losses(backbone, [moments] * len(part), [inputs] * len(part), prompts)
        losses += found.view(len(part), -1).mean(1).tolist()
    return losses


def _cache_file(concept: Concept, moments: Moments, seed: int, key: str) -> Path:
    digest = hashlib.sha256(f"{key}/{seed}/{concept.captions or concept.templates}".encode())
    digest.update(concept.pictures.numpy().tobytes())
    digest.update(str(tuple(moments.mean.shape)).encode())
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return home / "t2iprobe" / "nearest_words" / f"{digest.hexdigest()[:24]}.json"

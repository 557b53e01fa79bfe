"""Captions of the training pictures, and a CLIP tokenizer that has seen nothing but these captions."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from t2iprobe import wordnet
from t2iprobe.hypernymy.hierarchy import Hierarchy

MAX_TOKENS = 32
MERGES = 1000
TEMPLATES = (
    *("An image of {article} {lemma}.",) * 6,
    "a photo of a {lemma}.",
    "a painting of a {lemma}.",
    "a {lemma}.",
    "{lemma}",
    "A picture of {article} {lemma}.",
    "this is {article} {lemma}",
    "{article} {lemma} on a white background",
    "a drawing of the {lemma}",
    "one {lemma}, isolated",
)


def lemmas(synset: str) -> list[str]:
    """The words of a synset as they stand in prompts: lower case, blanks for underscores."""
    return [name.lower().replace("_", " ") for name in wordnet.synset(synset).lemma_names()]


def write_caption(synset: str, rng: random.Random) -> str:
    """A caption for a picture of the leaf `synset`: 70 % by its own name, else by a hypernym one to four
    levels up.
    """
    hierarchy, named = Hierarchy.imagenet(), synset
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 4)):
            above = hierarchy.parents(named)
            named = rng.choice(above) if above else named
    words = lemmas(named)
    lemma = words[0] if rng.random() < 0.8 else rng.choice(words)
    return rng.choice(TEMPLATES).format(lemma=lemma, article="an" if lemma[0] in "aeiou" else "a")


def train_tokenizer(synsets: list[str], folder: Path, seed: int = 0) -> CLIPTokenizer:
    """Learn MERGES byte-pair merges from captions of `synsets` and save a CLIP tokenizer of 32 tokens in
    `folder`.
    """
    rng = random.Random(seed)
    counted = Counter(write_caption(synset, rng) for synset in synsets for _ in range(200))
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+|[^\w\s]+"), "removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=512 + MERGES,
        end_of_word_suffix="</w>",
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(sorted(counted.elements()), trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple(pair) for pair in learned][:MERGES]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS
    )
    tokenizer.save_pretrained(folder)
    return tokenizer

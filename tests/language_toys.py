"""Tiny language models with random weights, in float64: what is equal is equal."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 40


def make_toy(
    seed: int = 0,
    layers: int = 3,
    sharpness: float = 6.0,
    vocabulary: int = VOCABULARY,
    context: int = 256,
) -> LlamaForCausalLM:
    """Return a Llama of width 32 in float64; the greater `sharpness`, the surer it is of the next token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    model.lm_head.weight *= sharpness / 6
    return model


def blur(model: LlamaForCausalLM, noise: float = 0.05, seed: int = 1) -> LlamaForCausalLM:
    """Return a copy with noisy weights, a draft that is often right."""
    generator = torch.Generator().manual_seed(seed)
    twin = LlamaForCausalLM(model.config).double().eval().requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    for parameter in twin.parameters():
        scale = noise * parameter.std() if parameter.ndim > 1 else 0.0
        parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return twin


def write_plainly(model: LlamaForCausalLM, prompt: torch.Tensor, count: int) -> list[int]:
    """Return `count` greedy tokens, each from a forward over the whole text."""
    text = prompt.clone()
    for _ in range(count):
        token = model(text[None]).logits[0, -1].argmax()
        text = torch.cat([text, token[None]])
    return text[len(prompt) :].tolist()


WORDS = ["<s>", "</s>", "<unk>", "user", "bot", ":", *"abcdefghijklmnopqrstuvwxyz", *"0123456", "."]


def save_toy(folder: Path, model: LlamaForCausalLM | None = None, words: Sequence[str] = WORDS) -> Path:
    """Write a toy with a tokenizer of single letters and a chat template, as a folder that loads."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message.content }}.{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    (model or make_toy()).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder

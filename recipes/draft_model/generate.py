"""Let the target write: greedy and sampled continuations of the training prompts, with its best guesses.

Of every token written, the KEPT most probable next tokens and their log-probabilities are stored, so that
training needs no pass of the target. Batches hold prompts of exactly equal length: no padding, no mask.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from prompts import WORDINGS, encoder, held_out_prompts, training_prompts
from torch import Tensor, nn

from t2iprobe.llm.models import find_language_model, load_language_model, load_tokenizer
from t2iprobe.storage import write_atomically

WORK = Path.home() / ".cache" / "t2iprobe" / "draft_model"
KEPT = 24
POOL = 48_000
PROMPTS = 96
LENGTHS = (64, 128, 160)


class Writer:
    """The target in bfloat16 with joint projections and preallocated keys and values, for batches of equally
    long texts. Transformers' own loop copies the cache and repeats its heads at every step.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        """Take the weights of a Llama-shaped `model`."""
        self.config, self.dtype = model.config, dtype
        self.heads, self.groups = model.config.num_attention_heads, model.config.num_key_value_heads
        self.size = model.config.hidden_size // self.heads
        self.layers = [
            (
                layer.input_layernorm.weight.to(dtype),
                torch.cat([getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]).to(dtype),
                layer.self_attn.o_proj.weight.to(dtype),
                layer.post_attention_layernorm.weight.to(dtype),
                torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]).to(dtype),
                layer.mlp.down_proj.weight.to(dtype),
            )
            for layer in model.model.layers
        ]
        self.norm, self.exact = model.model.norm.weight.to(dtype), model.lm_head.weight
        self.embedding = self.exact.to(dtype)
        self.rotary = model.model.rotary_emb

    def start(self, batch: int, capacity: int) -> None:
        """Make room for `capacity` tokens of `batch` texts."""
        shape = (len(self.layers), 2, batch, self.groups, capacity, self.size)
        self.cache, self.length = torch.empty(shape, dtype=self.dtype), 0

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin

    def __call__(self, tokens: Tensor) -> Tensor:
        """Read tokens [B, n] and give the last one's final hidden state [B, h]."""
        batch, n = tokens.shape
        x, begin, end = F.embedding(tokens, self.embedding), self.length, self.length + n
        cos, sin = self.rotary(x, torch.arange(begin, end)[None])
        eps, width = self.config.rms_norm_eps, self.groups * self.size
        for layer, (norm1, qkv, out, norm2, gate_up, down) in enumerate(self.layers):
            joint = F.linear(F.rms_norm(x, norm1.shape, norm1, eps), qkv)
            q, k, v = (
                part.view(batch, n, -1, self.size).transpose(1, 2)
                for part in joint.split([x.shape[-1], width, width], -1)
            )
            q, keys, values = self._rotate(q, cos, sin), *self.cache[layer]
            keys[:, :, begin:end], values[:, :, begin:end] = self._rotate(k, cos, sin), v
            keys, values = keys[:, :, :end], values[:, :, :end]
            if n == 1:  # the queries that share a head are like so many tokens
                seen = F.scaled_dot_product_attention(q.view(batch, self.groups, -1, self.size), keys, values)
            else:
                mask = torch.ones(n, end, dtype=torch.bool).tril(begin)
                seen = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
            seen = seen.reshape(batch, self.heads, n, self.size).transpose(1, 2).reshape(batch, n, -1)
            x = x + F.linear(seen, out)
            gate, up = F.linear(F.rms_norm(x, norm2.shape, norm2, eps), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        self.length = end
        return F.rms_norm(x[:, -1], self.norm.shape, self.norm, eps)

    def guesses(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The KEPT most probable tokens [B, KEPT] after hidden states [B, h], best first, and their
        log-probabilities. Their logits are computed anew in fp32: bfloat16 resolves no better than 1/8.
        """
        logits = F.linear(hidden, self.embedding)
        total, found = logits.float().logsumexp(-1), logits.topk(KEPT, -1).indices
        exact = torch.einsum("bkh,bh->bk", self.exact[found], hidden.float())
        log_probs, order = (exact - total[:, None]).sort(-1, descending=True)
        return found.gather(1, order), log_probs

    def keep(self, rows: Tensor) -> None:
        """Forget all texts but `rows`."""
        self.cache = self.cache[:, :, rows]


@dataclass(frozen=True)
class Batch:
    """Prompts of equal length, and what is to be written after each: once greedy, once sampled."""

    tasks: list[str]
    prompts: list[list[int]]
    temperature: float
    length: int


def batches(prompts: list[tuple[str, list[int]]], least: int = 1, seed: int = 0) -> list[Batch]:
    """Batches of at least `least` (task, tokens) of equal length, in an order drawn from `seed`; of the rest,
    some are left out.
    """
    by_length = defaultdict(list)
    for task, tokens in prompts:
        by_length[len(tokens)].append((task, tokens))
    rng, made = random.Random(seed), []
    for rows in by_length.values():
        for begin in range(0, len(rows) - least + 1, PROMPTS):
            tasks, prompts = zip(*rows[begin : begin + PROMPTS], strict=True)
            made.append(Batch(list(tasks), list(prompts), rng.choice((0.7, 1.0)), rng.choice(LENGTHS)))
    rng.shuffle(made)
    return made


@torch.inference_mode()
def write(writer: Writer, batch: Batch, end: int, generator: torch.Generator) -> dict[str, np.ndarray]:
    """What the target writes after each prompt, first all greedy texts, then all sampled ones.

    Returns per text its task, the lengths of its prompt and of what was written (with the token `end`, if it
    came), then of all texts on end: tokens (prompt and written); of all written tokens on end: the target's
    guesses at each [KEPT] and their log-probabilities.
    """
    count = len(batch.prompts)
    prompts = torch.tensor(batch.prompts)
    shared = int((prompts == prompts[0]).all(0).long().cumprod(0)[:-1].sum())  # the system's words, read once
    writer.start(1, prompts.shape[1] + batch.length)
    if shared:
        writer(prompts[:1, :shared])
    writer.keep(torch.zeros(count, dtype=torch.int64))
    hidden = writer(prompts[:, shared:]).repeat(2, 1)
    writer.keep(torch.arange(count).repeat(2))
    rows, running = torch.arange(2 * count), torch.ones(2 * count, dtype=torch.bool)
    tokens = torch.full((2 * count, batch.length), end)
    guesses, log_probs = (
        torch.zeros(2 * count, batch.length, KEPT, dtype=d) for d in (torch.int64, torch.float32)
    )
    lengths = torch.zeros(2 * count, dtype=torch.int64)
    for step in range(batch.length):
        found, scores = writer.guesses(hidden)
        drawn = torch.multinomial((scores / batch.temperature).softmax(-1), 1, generator=generator)[:, 0]
        token = found.gather(1, torch.where(rows < count, 0, drawn)[:, None])[:, 0]
        tokens[rows, step], guesses[rows, step], log_probs[rows, step] = token, found, scores
        lengths[rows[running]] += 1
        running = running & (token != end)
        if not running.any():
            break
        if running.float().mean() < 0.8:  # dropping rows copies the cache
            rows, token = rows[running], token[running]
            writer.keep(running.nonzero()[:, 0])
            running = running[running]
        hidden = writer(token[:, None])
    written = torch.arange(batch.length) < lengths[:, None]
    texts = [
        [*prompt, *row[:n]]
        for prompt, row, n in zip(batch.prompts * 2, tokens.tolist(), lengths, strict=True)
    ]
    return {
        "tasks": np.array([list(WORDINGS).index(task) for task in batch.tasks * 2], np.uint8),
        "prompt_lengths": np.full(2 * count, prompts.shape[1], np.int32),
        "lengths": lengths.numpy().astype(np.int32),
        "tokens": np.concatenate([np.array(text, np.uint16) for text in texts]),
        "guesses": guesses[written].numpy().astype(np.uint16),
        "log_probs": log_probs[written].numpy().astype(np.float16),
    }


def main() -> None:
    """Write batches as `work`/texts/NNNN.npz, or `work`/held_out/NNNN.npz, until all are there.

    Several workers share them.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--held-out", type=int, metavar="N", help="write of N held-out prompts a task instead"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)  # two processes of one thread are faster than one of two
    files = find_language_model("smollm2")
    tokenizer = load_tokenizer(files)
    held_out, encode = given.held_out is not None, encoder(tokenizer)
    writer = Writer(load_language_model(files), torch.float32 if held_out else torch.bfloat16)
    folder = given.work / ("held_out" if held_out else "texts")
    folder.mkdir(parents=True, exist_ok=True)
    prompts = held_out_prompts(given.held_out) if held_out else training_prompts(POOL)
    encoded = [(task, encode(prompt)) for task, prompt in prompts]
    for index, batch in enumerate(batches(encoded, least=1 if held_out else PROMPTS // 4)):
        path = folder / f"{index:04}.npz"
        if index % given.workers != given.worker or path.exists():
            continue
        started = time.time()
        made = write(writer, batch, tokenizer.eos_token_id, torch.Generator().manual_seed(index))
        content = io.BytesIO()
        np.savez(content, **made)
        write_atomically(path, content.getvalue())
        count = int(made["lengths"].sum())
        print(f"{path.name}: {count} tokens, {count / (time.time() - started):.0f}/s", flush=True)


if __name__ == "__main__":
    main()

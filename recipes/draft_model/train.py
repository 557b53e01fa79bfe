"""Distil the student: a few of the target's layers learn to guess what all of them write.

Loss: cross-entropy with the target's KEPT stored probabilities, and with its most probable token alone,
which is what greedy decoding accepts. The softmax runs over the tokens that the batch's guesses name and some
random ones that stand for all others: the full vocabulary would cost more than the layers.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from pathlib import Path

import numpy as np
import torch
from generate import WORK
from measure import acceptance, read_texts
from torch import Tensor, nn

from t2iprobe.llm.engine.student import load_student, own_parameters, student_of
from t2iprobe.llm.models import find_language_model, load_language_model
from t2iprobe.storage import write_atomically

LAYERS = (0, 10, 20, 29)
RANDOM = 2048
TOKENS = 1600  # in a batch, prompts included


def initial_student(target: nn.Module, layers: tuple[int, ...]) -> nn.Module:
    """A student whose layers and final norm start as copies of the target's `layers` and norm."""
    student = student_of(target, len(layers))
    for mine, chosen in zip(student.model.layers, layers, strict=True):
        mine.load_state_dict(target.model.layers[chosen].state_dict())
    student.model.norm.load_state_dict(target.model.norm.state_dict())
    return student


def candidates(guesses: Tensor, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens [S] that a softmax runs over, the log of how many tokens each stands for [S], and the places
    [N, KEPT] of `guesses` among them.
    """
    named, places = guesses.unique(return_inverse=True)
    free = torch.ones(vocabulary, dtype=torch.bool)
    free[named] = False
    others = free.nonzero()[:, 0]
    drawn = others[torch.randperm(len(others), generator=generator)[:RANDOM]]
    counts = torch.cat(
        [torch.zeros(len(named)), torch.full((len(drawn),), math.log(len(others) / len(drawn)))]
    )
    return torch.cat([named, drawn]), counts, places


def loss_of(student: nn.Module, batch: list[dict], hard: float, generator: torch.Generator) -> Tensor:
    """The loss of a batch of texts (scalar), a share `hard` of it by the most probable token alone."""
    longest = max(len(text["tokens"]) for text in batch)
    tokens = torch.zeros(len(batch), longest - 1, dtype=torch.int64)  # right padding: nothing looks at it
    written = torch.zeros(len(batch), longest - 1, dtype=torch.bool)
    for row, text in enumerate(batch):
        tokens[row, : len(text["tokens"]) - 1] = torch.from_numpy(text["tokens"][:-1].astype(np.int64))
        written[row, text["prompt_length"] - 1 : len(text["tokens"]) - 1] = True
    guesses = torch.from_numpy(np.concatenate([text["guesses"] for text in batch]).astype(np.int64))
    probs = torch.from_numpy(np.concatenate([text["log_probs"] for text in batch]).astype(np.float32)).exp()
    named, counts, places = candidates(guesses, student.config.vocab_size, generator)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = student.model(tokens, use_cache=False).last_hidden_state[written]
        logits = hidden @ student.lm_head.weight[named].T
    logits = logits.float() + counts
    log_q = logits.gather(1, places) - logits.logsumexp(-1, keepdim=True)
    return -(1 - hard) * (probs * log_q).sum(-1).mean() - hard * log_q[:, 0].mean()


def epoch_batches(lengths: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """All texts in batches of about TOKENS, texts of like length together, batches in random order."""
    made = []
    for window in np.array_split(rng.permutation(len(lengths)), max(1, len(lengths) // 1024)):
        window = window[np.argsort(lengths[window])]
        cuts = np.flatnonzero(np.diff(np.cumsum(lengths[window]) // TOKENS)) + 1
        made += np.split(window, cuts)
    return [made[index] for index in rng.permutation(len(made))]


def main() -> None:
    """Train for --steps and leave `work`/student.pt; continues from it. New texts are read at every epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, help="default: WORK/student.pt")
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--hard", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shipped", action="store_true", help="begin with the shipped student's weights")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    out = given.out or given.work / "student.pt"
    target = load_language_model(find_language_model("smollm2"))
    student = load_student(target) if given.shipped else initial_student(target, tuple(given.layers))
    learned = list(own_parameters(student).values())
    for parameter in learned:
        parameter.requires_grad_(True)
    del target
    optimizer = torch.optim.AdamW(learned, lr=given.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    step = epoch = 0
    if out.exists():
        state = torch.load(out, weights_only=True)
        for name, parameter in own_parameters(student).items():
            parameter.data.copy_(state["student"][name])
        optimizer.load_state_dict(state["optimizer"])
        step, epoch = state["step"], state["epoch"]
    held_out = read_texts(given.work / "held_out")

    def save() -> None:
        weights = {name: parameter.detach() for name, parameter in own_parameters(student).items()}
        content = io.BytesIO()
        state = {"student": weights, "optimizer": optimizer.state_dict(), "step": step, "epoch": epoch}
        torch.save(state | {"layers": list(given.layers)}, content)
        write_atomically(out, content.getvalue())

    saved = shown = time.time()
    losses: list[float] = []
    read = 0
    while step < given.steps:
        texts = read_texts(given.work / "texts")
        rng = np.random.default_rng(epoch)
        lengths = np.array([len(text["tokens"]) for text in texts])
        print(f"epoch {epoch}: {len(texts)} texts, {lengths.sum()} tokens", flush=True)
        for batch in epoch_batches(lengths, rng):
            # level, then linear to zero over the last 40 %: the end may be moved while it is level
            rate = given.rate * min(1, (step + 1) / 100, (given.steps - step) / (0.4 * given.steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            generator = torch.Generator().manual_seed(step)
            loss = loss_of(student, [texts[index] for index in batch], given.hard, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            step, read = step + 1, read + int(lengths[batch].sum())
            losses.append(loss.item())
            if step % 50 == 0:
                speed = read / (time.time() - shown)
                print(f"step {step}: loss {np.mean(losses):.3f}, {speed:.0f} tokens/s", flush=True)
                losses, read, shown = [], 0, time.time()
            if step % 250 == 0 or step == given.steps:
                vector = acceptance(student, held_out[: 150 if step < given.steps else None])["all"]
                print(f"step {step}: acceptance {' '.join(f'{p:.3f}' for p in vector)}", flush=True)
                shown = time.time()
            if time.time() - saved > 60 or step == given.steps:
                save()
                saved = time.time()
            if step == given.steps:
                return
        epoch += 1


if __name__ == "__main__":
    main()

"""Teaching a model that a swarm serves: parameters of the client's own, trained through remote blocks.

A soft prompt is rows that stand before every text where it enters the first block (arXiv 2104.08691). An
adapter changes hidden states on their way into a span, h + B A h, on the client's side: a LoRA between spans.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from t2iprobe.errors import UserError
from t2iprobe.llm.models import Tokenizer
from t2iprobe.llm.swarm.blocks import Ends
from t2iprobe.llm.swarm.taught import Adapters, SoftPrompt
from t2iprobe.llm.swarm.training import BlockChain, Rows, run_blocks
from t2iprobe.storage import is_utf8, read_lines

__all__ = ["Example", "Tuning", "example_loss", "parse_borders", "read_examples", "tune"]

_IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A text that is to be written, int64 [T], after a prompt of so many of its tokens."""

    tokens: Tensor
    prompt: int


@dataclass(frozen=True)
class Tuning:
    """How to train: rows of the soft prompt, rank of the adapters (0: none), the blocks before which they
    stand (without, before the first), passes over the examples, examples a step, learning rate, share of
    examples held out."""

    rows: int = 8
    rank: int = 0
    borders: Sequence[int] = ()
    epochs: int = 10
    batch: int = 8
    learning_rate: float = 0.02
    held_out: float = 0.2
    seed: int = 0


def example_loss(
    ends: Ends,
    chain: BlockChain,
    examples: Sequence[Example],
    prompt: Tensor,
    adapters: Adapters | None = None,
) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of the texts' tokens after their prompts, and how many these are.

    `prompt` [P, hidden] stands before each text; gradients reach it and the adapters.
    """
    count, longest = len(examples), max(len(each.tokens) for each in examples)
    shift, device = len(prompt), prompt.device
    tokens = torch.zeros(count, longest, dtype=torch.int64)
    targets = torch.full((count, longest), _IGNORED)
    for row, each in enumerate(examples):
        size = len(each.tokens)
        tokens[row, :size] = each.tokens
        targets[row, each.prompt - 1 : size - 1] = each.tokens[each.prompt :]
    rows = shift + longest
    positions = torch.arange(rows).expand(count, -1)
    embedded = ends.embed(tokens.to(device), positions[:, shift:].to(device))
    hidden = torch.cat([prompt.expand(count, -1, -1), embedded.to(prompt.dtype)], 1)
    # Padding stands behind the text, where no token of it looks.
    mask = torch.ones(count, rows, rows, dtype=torch.bool).tril()
    borders = () if adapters is None else adapters.borders
    block = 0
    for border in (*borders, chain.blocks):
        if border > block:
            hidden = run_blocks(chain, Rows(hidden, positions, mask), block, border)
        if adapters is not None:
            hidden = adapters(hidden, border)
        block = border
    logits = ends.head(hidden[:, shift:])
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten().to(device), ignore_index=_IGNORED, reduction="sum"
    )
    return loss, int((targets != _IGNORED).sum())


def tune(
    ends: Ends,
    chain: BlockChain,
    examples: Sequence[Example],
    how: Tuning,
    show: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[SoftPrompt, Adapters | None, list[dict[str, float]]]:
    """Train a soft prompt, and adapters where asked; return them and, by epoch, the loss a token.

    The first entry is the loss before training, with the examples' own beginning as soft prompt (its rows
    begin as embeddings of tokens of the examples). Raises UserError for too few examples.
    """
    generator = torch.Generator().manual_seed(how.seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    held = max(1, round(how.held_out * len(examples)))
    if len(examples) < 2:
        raise UserError("one example cannot be learned from and judged by: give two or more")
    test, train = [examples[n] for n in order[:held]], [examples[n] for n in order[held:]]
    if not train:
        raise UserError(f"no example is left to learn from where {held} are held out: lower --held-out")
    if not how.rows and not how.rank:
        raise UserError("nothing is taught by no rows and no adapters: give --rows or --rank")
    prompt = SoftPrompt(_begin_prompt(ends, train, how.rows, generator))
    adapters = None
    if how.rank:
        if bad := [border for border in how.borders if not 0 <= border < chain.blocks]:
            raise UserError(f"there is no block {bad[0]} to put an adapter before: there are {chain.blocks}")
        rows = prompt.rows
        adapters = Adapters(rows.shape[1], how.rank, how.borders or [0], rows.dtype, how.seed).to(rows.device)
    parameters = [*prompt.parameters(), *(adapters.parameters() if adapters else ())]
    optimizer = torch.optim.AdamW(parameters, lr=how.learning_rate, weight_decay=0.0)
    steps = how.epochs * math.ceil(len(train) / how.batch)
    history = [_judge(ends, chain, train, test, prompt, adapters, how.batch)]
    done = 0
    for _ in range(how.epochs):
        shuffled = [train[n] for n in torch.randperm(len(train), generator=generator).tolist()]
        for part in _batches(shuffled, how.batch):
            optimizer.zero_grad()
            loss, count = example_loss(ends, chain, part, prompt.rows, adapters)
            (loss / count).backward()
            optimizer.step()
            done += 1
            show(done, steps)
        history.append(_judge(ends, chain, train, test, prompt, adapters, how.batch))
    return prompt, adapters, history


def _begin_prompt(ends: Ends, train: Sequence[Example], rows: int, generator: torch.Generator) -> Tensor:
    weight = ends.model.get_input_embeddings().weight
    if not rows:
        width = ends.model.config.get_text_config().hidden_size
        return torch.zeros(0, width, dtype=weight.dtype, device=weight.device)
    every = torch.cat([each.tokens for each in train])
    tokens = every[torch.randint(len(every), (rows,), generator=generator)]
    return ends.embed(tokens[None].to(weight.device), torch.arange(rows, device=weight.device)[None])[0]


@torch.no_grad()
def _judge(
    ends: Ends,
    chain: BlockChain,
    train: Sequence[Example],
    test: Sequence[Example],
    prompt: SoftPrompt,
    adapters: Adapters | None,
    batch: int,
) -> dict[str, float]:
    found = {}
    for name, some in (("train_loss", train), ("held_out_loss", test)):
        parts = [example_loss(ends, chain, part, prompt.rows, adapters) for part in _batches(some, batch)]
        found[name] = float(sum(float(loss) for loss, _ in parts) / sum(count for _, count in parts))
    return found


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


# -- files ---------------------------------------------------------------------------------------------


def parse_borders(text: str | None) -> list[int]:
    """Return the blocks of "0,15". Raises UserError for anything else."""
    parts = [] if text is None else text.split(",")
    if bad := [part for part in parts if not part.strip().isdecimal()]:
        raise UserError(f"--borders are numbers of blocks, such as 0,15, not {bad[0]!r}")
    return [int(part) for part in parts]


def read_examples(path: Path, tokenizer: Tokenizer, most_tokens: int = 256) -> list[Example]:
    """Read JSONL rows of `text`, and `prompt` if it follows one; texts are cut at `most_tokens`.

    Raises UserError for another line.
    """
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, prompt = row["text"], row.get("prompt", "")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            text = prompt = None
        if not isinstance(text, str) or not isinstance(prompt, str) or not text.strip():
            raise UserError(f'{path}, line {number}: write {{"text": "…"}}, with a "prompt" if it has one')
        if not is_utf8([prompt, text]):
            raise UserError(f"{path}, line {number}: half of a surrogate pair is no character, leave it out")
        before = tokenizer(prompt).input_ids if prompt else []
        before = before or begin or tokenizer(text).input_ids[:1]
        after = [*tokenizer(text, add_special_tokens=False).input_ids, *end]
        tokens = [*before, *after][:most_tokens]
        if len(before) < len(tokens):
            found.append(Example(torch.tensor(tokens, dtype=torch.int64), len(before)))
    if not found:
        raise UserError(f"{path} holds no examples")
    return found

"""What does a filter do? Small Llamas trained from scratch on what recipes keep, judged on the same texts.

After RedPajama-V2's ablation (arXiv 2411.12372 §4) and CuatroLLM's translated corpora (arXiv 2410.23956): the
same architecture, tokenizer, tokens and seeds for every arm, so that the arms differ in their texts alone.
"""

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus.documents import Source, number_of
from t2iprobe.llm.corpus.filters import filter_file, load_recipe
from t2iprobe.storage import write_output

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Show = Callable[[int, int], None]
Tokens = NDArray[np.uint16]

_HELD_OUT = 10  # one text in so many is never trained on and judges
_JUDGED = 200  # texts that judge at most
_PIECE = 10_000  # characters that a tokenizer is trained on at once: a word takes its length's square in time
_END = "<|end|>"
TASKS = ("word_order", "word_choice")


@dataclass(frozen=True)
class Training:
    """One size for all arms.

    hidden, layers: of the Llama. tokens: that each arm trains on, its texts again where they do not reach.
    length: tokens of a sequence. batch: sequences of a step. rate: highest learning rate, warmed up for a
    tenth and let down along a cosine. vocabulary: of the byte-pair tokenizer, which is trained on all texts.
    """

    hidden: int = 128
    layers: int = 4
    tokens: int = 1_000_000
    length: int = 256
    batch: int = 16
    rate: float = 2e-3
    vocabulary: int = 4096

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise UserError(f"{name} is above 0, not {value}")
        if self.hidden % 32:
            raise UserError(f"the hidden size is a multiple of 32, not {self.hidden}")
        if not 512 <= self.vocabulary <= 65_536:
            raise UserError(f"a vocabulary has 512 to 65,536 tokens, not {self.vocabulary}")

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        return max(1, self.tokens // (self.length * self.batch))


@dataclass(frozen=True)
class Arm:
    """A name and the files of texts that it trains on, each with its weight among the tokens."""

    name: str
    parts: tuple[tuple[Path, float], ...]


def split_corpus(source: Source, folder: Path) -> tuple[Path, Path]:
    """Write the texts that train and those that judge, by their ids' hashes. Returns both files."""
    paths = folder / "train.jsonl", folder / "judge.jsonl"
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for chunk in source.read():
        for row in source.parse(chunk)[0]:
            line = json.dumps({"id": row.id, "text": row.text}, ensure_ascii=False).encode() + b"\n"
            parts[number_of(row.id) % _HELD_OUT == 0].append(line)
    for path, lines in zip(paths, parts, strict=True):
        if not lines:
            raise UserError(f"{source.path} has too few texts to train on some and judge by others")
        write_output(path, b"".join(lines))
    return paths


def make_arms(train: Path, signals: Path, recipes: Sequence[str], folder: Path) -> list[Arm]:
    """Filter the texts that train by each recipe; none keeps all. Raises UserError where nothing is left."""
    arms = []
    for name in recipes:
        kept = train if name == "none" else folder / f"{Path(name).stem}.jsonl"
        if name != "none":
            found = filter_file(Source.open(train), signals, load_recipe(name), kept)
            if not found["kept"]:
                raise UserError(f"the recipe {name} keeps none of {found['rows']} texts")
        arms.append(Arm(Path(name).stem, ((kept, 1.0),)))
    return arms


def parse_mix(text: str, files: Mapping[str, Path]) -> Arm:
    """Read ``en:1,es-mt:2``: names of `files` and their weights. Raises UserError for anything else."""
    parts = []
    for part in text.split(","):
        name, _, weight = part.partition(":")
        if name not in files:
            raise UserError(f"the mix {text!r} names {name!r}; files are named by --texts NAME=FILE")
        try:
            number = float(weight or 1)
        except ValueError:
            number = 0.0
        if not 0 < number < math.inf:
            raise UserError(f"a weight is a number above 0, not {weight!r} in {text!r}")
        parts.append((files[name], number))
    return Arm(text, tuple(parts))


def train_tokenizer(files: Sequence[Path], vocabulary: int) -> "Tokenizer":
    """Train a byte-level byte-pair tokenizer on all texts of files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (
        text[start : start + _PIECE]
        for path in files
        for text in _read(path)
        for start in range(0, len(text), _PIECE)
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def _read(path: Path) -> Iterator[str]:
    source = Source.open(path)
    for chunk in source.read():
        for row in source.parse(chunk)[0]:
            yield row.text


def encode_file(path: Path, tokenizer: "Tokenizer", seed: int) -> Tokens:
    """Return the tokens of a file's texts in an order of the seed's, each text ended by the end token."""
    texts = list(_read(path))
    random.Random(seed).shuffle(texts)
    end = tokenizer.token_to_id(_END)
    encoded = tokenizer.encode_batch_fast(texts)
    return np.concatenate([np.array([*each.ids, end], np.uint16) for each in encoded])


def draw_sequences(
    parts: Sequence[tuple[Tokens, float]], training: Training, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Yield batches [batch, length + 1]: each sequence of one part, drawn by weight, read on where it was."""
    rng = np.random.default_rng(seed)
    weights = np.array([weight for _, weight in parts])
    places = [0] * len(parts)
    size = training.length + 1
    streams = [np.resize(tokens, max(len(tokens), size)) for tokens, _ in parts]
    for _ in range(training.steps):
        rows = []
        for part in rng.choice(len(parts), training.batch, p=weights / weights.sum()):
            if places[part] + size > len(streams[part]):
                places[part] = 0
            rows.append(streams[part][places[part] : places[part] + size])
            places[part] += training.length
        yield np.stack(rows).astype(np.int64)


def train_model(parts: Sequence[tuple[Tokens, float]], training: Training, seed: int, show: Show) -> Any:
    """Train a Llama of the given size from scratch; accelerate chooses device and spreads it."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from transformers import LlamaConfig, LlamaForCausalLM

    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=training.vocabulary,
            hidden_size=training.hidden,
            intermediate_size=training.hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=training.layers,
            num_attention_heads=training.hidden // 32,
            max_position_embeddings=training.length,
            tie_word_embeddings=True,
        )
    )
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(model.parameters(), training.rate, betas=(0.9, 0.95), weight_decay=0.1)
    steps, warm = training.steps, max(1, training.steps // 10)

    def rate(step: int) -> float:
        done = (step - warm) / max(1, steps - warm)
        return (step + 1) / warm if step < warm else 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    for step, rows in enumerate(draw_sequences(parts, training, seed)):
        batch = torch.from_numpy(rows).to(accelerator.device)
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        show(step + 1, steps)
    return accelerator.unwrap_model(model).eval()


def judge(model: Any, tokenizer: "Tokenizer", texts: Sequence[str], training: Training) -> dict[str, float]:
    """Return bits per byte on texts, and how often they are preferred to spoilt copies, by task.

    word_order: two neighbouring words of a passage swapped. word_choice: a word replaced by one of another
    text. The passage as it was must have the higher probability; chance is one half.
    """
    bits = total = 0.0
    for text in texts:
        bits -= _log2_probability(model, tokenizer, text, training.length)
        total += len(text.encode())
    rng = random.Random(0)
    words = [word for text in texts for word in text.split()]
    right = dict.fromkeys(TASKS, 0)
    passages = [part for part in map(_passage, texts) if len(set(part)) > 5]
    for passage in passages:
        own = _log2_probability(model, tokenizer, " ".join(passage), training.length)
        for task in TASKS:
            spoilt = _spoil(passage, task, words, rng)
            right[task] += own > _log2_probability(model, tokenizer, " ".join(spoilt), training.length)
    shares = {task: count / max(len(passages), 1) for task, count in right.items()}
    return {"bits_per_byte": bits / total, **shares, "accuracy": sum(shares.values()) / len(TASKS)}


def _passage(text: str) -> list[str]:
    words = text.split()
    middle = max(0, len(words) // 2 - 12)
    return words[middle : middle + 24]


def _spoil(passage: list[str], task: str, words: Sequence[str], rng: random.Random) -> list[str]:
    places = [place for place in range(1, len(passage)) if passage[place] != passage[place - 1]]
    place, spoilt = rng.choice(places), list(passage)
    if task == "word_order":
        spoilt[place - 1 : place + 1] = passage[place], passage[place - 1]
        return spoilt
    while spoilt[place] == passage[place]:
        spoilt[place] = rng.choice(words)
    return spoilt


def _log2_probability(model: Any, tokenizer: "Tokenizer", text: str, length: int) -> float:
    """Return log2 of a text's probability behind an end token, in windows of `length` that do not overlap."""
    import torch

    ids = [tokenizer.token_to_id(_END), *tokenizer.encode(text).ids]
    bits = 0.0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, length):
            part = torch.tensor([ids[start : start + length + 1]], device=model.device)
            scores = model(input_ids=part[:, :-1]).logits.float().log_softmax(-1)
            bits += float(scores[0].gather(1, part[0, 1:, None]).sum()) / math.log(2)
    return bits


def ablate(
    arms: Sequence[Arm], judges: Path, folder: Path, training: Training, seeds: int, show: Show
) -> dict[str, Any]:
    """Train every arm with every seed, judge each, and compare the arms with the first.

    What is done is kept in `folder`, a file for each arm and seed: the same call goes on where it was.
    """
    if seeds < 1:
        raise UserError(f"there is 1 seed or more, not {seeds}")
    files = sorted({path for arm in arms for path, _ in arm.parts})
    settings = asdict(training) | {"texts": {path.name: _hash(path) for path in [*files, judges]}}
    found: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
    texts = sorted(_read(judges), key=lambda text: hashlib.sha256(text.encode()).digest())[:_JUDGED]
    tokenizer = None
    for number in range(seeds):
        for place, arm in enumerate(arms):
            key = json.dumps(
                [arm.name, [[path.name, weight] for path, weight in arm.parts], number, settings]
            )
            path = folder / f"done-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
            if not path.exists():
                tokenizer = tokenizer or train_tokenizer(files, training.vocabulary)
                parts = [(encode_file(file, tokenizer, number), weight) for file, weight in arm.parts]
                model = train_model(parts, training, number, show)
                scores: dict[str, Any] = judge(model, tokenizer, texts, training)
                scores |= {"arm": arm.name, "seed": number, "tokens_there": sum(len(t) for t, _ in parts)}
                scores |= {"parameters": sum(each.numel() for each in model.parameters())}
                write_output(path, json.dumps(scores, indent=1).encode())
            found[arm.name].append(json.loads(path.read_bytes()))
            show(number * len(arms) + place + 1, seeds * len(arms))
    return summarize(found, training)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def summarize(found: Mapping[str, Sequence[Mapping[str, float]]], training: Training) -> dict[str, Any]:
    """Return each arm's means over seeds and its paired differences from the first arm, with intervals."""
    names = ("bits_per_byte", *TASKS, "accuracy")
    first = next(iter(found))
    arms = []
    for arm, runs in found.items():
        row: dict[str, Any] = {"arm": arm, "tokens_there": runs[0]["tokens_there"], "seeds": len(runs)}
        row["epochs"] = training.tokens / runs[0]["tokens_there"]
        for name in names:
            values = np.array([run[name] for run in runs])
            row[name] = describe_seeds(values)
            if arm != first:
                base = np.array([run[name] for run in found[first]])
                row[f"{name}_difference"] = describe_seeds(values - base)
        arms.append(row)
    return {"training": asdict(training), "arms": arms, "warning": find_disagreement(arms)}


def describe_seeds(values: NDArray[np.float64]) -> dict[str, Any]:
    """Return the mean over seeds and Student's 95 % interval, None for one seed. Few seeds: no bootstrap."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return {"value": float(values.mean()), "interval": None}
    half = float(t.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count))
    return {
        "value": float(values.mean()),
        "interval": [float(values.mean()) - half, float(values.mean()) + half],
    }


def find_disagreement(arms: Sequence[Mapping[str, Any]]) -> str | None:
    """Tell which arms perplexity and accuracy order differently: never choose by perplexity alone."""
    if len(arms) < 2:
        return None
    fluent = min(arms, key=lambda row: row["bits_per_byte"]["value"])
    right = max(arms, key=lambda row: row["accuracy"]["value"])
    if fluent["arm"] != right["arm"]:
        return (
            f"{fluent['arm']} has the fewest bits per byte, {right['arm']} the highest accuracy: "
            "perplexity alone would choose another"
        )
    pairs = [
        f"{one['arm']} and {other['arm']}"
        for one, other in itertools.combinations(arms, 2)
        if (one["bits_per_byte"]["value"] - other["bits_per_byte"]["value"])
        * (one["accuracy"]["value"] - other["accuracy"]["value"])
        > 0
    ]
    if not pairs:
        return None
    return f"perplexity and accuracy both choose {right['arm']}, but disagree on {'; '.join(pairs)}"


def tabulate(found: Mapping[str, Any]) -> str:
    """Return the table as Markdown."""

    def cell(each: Mapping[str, Any], digits: int) -> str:
        text = f"{each['value']:.{digits}f}"
        low_high = each["interval"]
        return text if low_high is None else f"{text} [{low_high[0]:.{digits}f}, {low_high[1]:.{digits}f}]"

    names = ("bits_per_byte", *TASKS, "accuracy")
    lines = [
        "| texts | tokens | epochs | bits per byte | word order | word choice | accuracy |",
        "|---|" + "---:|" * 6,
    ]
    for row in found["arms"]:
        cells = [cell(row[name], 4 if name == "bits_per_byte" else 3) for name in names]
        lines.append(
            f"| {row['arm']} | {row['tokens_there']:,} | {row['epochs']:.1f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)

"""What the commands of `t2iprobe llm` do: models into memory, prompts into text, measurements into tables."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from t2iprobe.errors import UserError, suggest
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.engine.drafts import Draft, LookupDraft, ModelDraft
from t2iprobe.llm.engine.generation import TREES, Generated, Trees, check_texts, generate
from t2iprobe.llm.engine.processing import Sampling
from t2iprobe.llm.engine.sizing import (
    BUDGETS,
    Acceptance,
    MeasuredSizer,
    PassTimes,
    measure_passes,
)
from t2iprobe.llm.memory.ledger import Ledger
from t2iprobe.llm.memory.packing import Packed, pack_layers, read_rest, view_tensors
from t2iprobe.llm.memory.placement import Placement, Shares
from t2iprobe.llm.memory.schedule import open_source, open_store
from t2iprobe.llm.memory.sources import DiskSource, QuantizedSource, empty_buffer
from t2iprobe.llm.memory.store import WeightStore, choose_resident
from t2iprobe.llm.models import (
    DEFAULT_MODEL,
    LanguageModelFiles,
    Tokenizer,
    cache_folder,
    check_parts,
    decoder_layers,
    find_language_model,
    layers_name,
    load_language_model,
    load_tokenizer,
    load_without_layers,
    name_tensors,
    share_rest,
)
from t2iprobe.llm.parts import Parts
from t2iprobe.storage import is_utf8, read_lines, write_atomically

__all__ = [
    "DRAFTS",
    "Engine",
    "load_engine",
    "make_draft",
    "parse_bytes",
    "plan_trees",
    "read_prompts",
    "write_texts",
]

DRAFTS = ("student", "early-exit:K", "lookup", "copy:BITS", "none", "a folder or a hub id")
_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}b": size for unit, size in _UNITS.items() if unit not in ("", "b")}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str) -> int:
    """Return the bytes of "300MB", "1.5GiB" or "2000000". Raises UserError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in _UNITS:
        raise UserError(f"{text!r} is no amount of memory: write it as 300MB, 1.5GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass
class Engine:
    """A target in memory as asked for, its draft, and what they need. Use it as a context, or close it."""

    files: LanguageModelFiles
    tokenizer: Tokenizer
    target: Decoder
    store: WeightStore | None = None
    draft: Draft | None = None
    draft_name: str = "none"
    memory: int | None = None
    packed: Packed | None = None
    placement: Placement | None = None
    link: float | None = None
    _stack: ExitStack = field(default_factory=ExitStack)
    _stores: list[WeightStore] = field(default_factory=list)
    _copy: QuantizedSource | None = None

    def call_at_end(self, close: Callable[[], None]) -> None:
        """Call this when the engine is closed."""
        self._stack.callback(close)

    def hold(self, store: WeightStore) -> WeightStore:
        """Close a store when the engine is."""
        self._stack.callback(store.close)
        self._stores.append(store)
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back and end the readers."""
        self._stack.close()

    def resident_bytes(self) -> int:
        """Return the bytes of all weights in fast memory: parameters, layers that stay, buffers."""
        models = [self.target.model]
        if isinstance(self.draft, ModelDraft):
            models.append(self.draft.decoder.model)
        storages = {
            parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
            for model in models
            for parameter in model.parameters()
            if not parameter.is_meta
        }
        packed = 0 if self._copy is None else sum(map(self._copy.traffic, range(self._copy.layers)))
        return sum(storages.values()) + packed + sum(s.counters.resident_peak_bytes for s in self._stores)

    @property
    def eos_token_ids(self) -> set[int]:
        """The tokens that end a text."""
        config = getattr(self.target.model, "generation_config", None)
        found = getattr(config, "eos_token_id", None)
        if found is None:  # 0 is a token
            found = self.tokenizer.eos_token_id
        return set(found if isinstance(found, list) else [] if found is None else [found])


def load_engine(
    model: str = DEFAULT_MODEL,
    draft: str | None = None,
    *,
    memory: int | None = None,
    link: float | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    prefetch: bool = True,
    placement: Placement | None = None,
) -> Engine:
    """Load a target and its draft.

    Args:
        model: smollm2, a folder or a hub id.
        draft: one of DRAFTS; None: the student for the packaged target, prompt lookup for others.
        memory: bytes for the weights of target and draft; layers of the target that do not fit are read
            from disk in each pass.
        link: bytes a second of a simulated link that they are read through.
        dtype: of the computation.
        device: where.
        prefetch: read ahead.
        placement: where the target's layers lie, and in how many bits; without, as many stay as `memory`
            holds. Its block's shape, cache and hidden states are for blocks of prompts only.

    Raises UserError for a model or a draft that cannot be had, a budget smaller than one layer, and a link
    that nothing crosses.
    """
    if link is not None and memory is None and placement is None:
        raise UserError("without a memory budget nothing is read through the link: give --memory, too")
    files = find_language_model(model)
    tokenizer = load_tokenizer(files)
    if memory is None and placement is None:
        engine = Engine(files, tokenizer, Decoder(load_language_model(files, dtype=dtype, device=device)))
    else:
        packed = pack_model(files, dtype, device)
        target = load_without_layers(files, read_rest(packed), dtype=dtype, device=device)
        engine = Engine(files, tokenizer, Decoder(target), memory=memory, packed=packed)
    try:
        name = draft or ("student" if model == DEFAULT_MODEL else "lookup")
        engine.draft_name, engine.draft = name, make_draft(name, engine)
        if engine.packed is not None:
            _stream_layers(engine, placement, link, prefetch)
    except BaseException:
        engine.close()
        raise
    return engine


def _stream_layers(engine: Engine, placement: Placement | None, link: float | None, prefetch: bool) -> None:
    """Open the target's layers where a placement has them; without, as many stay as memory holds."""
    assert engine.packed is not None
    fixed, buffers = engine.resident_bytes(), 2
    if placement is None:
        assert engine.memory is not None
        sizes = [file.nbytes for file in engine.packed.layers]
        fit = choose_resident(sizes, engine.memory, fixed, buffers)
        share, buffers = sum(sizes[layer] for layer in fit.resident) / sum(sizes), fit.buffers
        here = Shares(1, 0, 0)
        placement = Placement(1, 1, Shares(share, 0, 1 - share), here, here)
    ledger = Ledger({"device": engine.memory})
    ledger.take("device", "embedding, head and draft", fixed)
    source = open_source(engine.packed, placement.weight_bits, link)
    store = open_store(placement, source, engine.target.device, ledger, buffers=buffers, prefetch=prefetch)
    engine.placement, engine.link, engine.store = placement, link, engine.hold(store)
    engine.target = Decoder(engine.target.model, engine.store)


def pack_model(files: LanguageModelFiles, dtype: str = "auto", device: str = "cpu") -> Packed:
    """Return the layers as files in the cache folder. Raises UserError if it cannot be written."""
    cast = ("float32" if device == "cpu" else None) if dtype == "auto" else dtype
    out = cache_folder("packed", f"{files.hash.removeprefix('sha256:')[:16]}-{cast or 'as-is'}")
    try:
        return pack_layers(files.folder, out, cast, lambda: name_tensors(files))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None


def make_draft(name: str, engine: Engine) -> Draft | None:
    """Return the draft of that name (see DRAFTS) for an engine's target."""
    kind, _, value = name.partition(":")
    if name == "none":
        return None
    if name == "lookup":
        return LookupDraft(engine.target.vocabulary)
    if name == "student":
        from t2iprobe.llm.engine.student import load_student

        return ModelDraft(Decoder(load_student(engine.target.model)))
    if kind == "early-exit":
        return ModelDraft(Decoder(_exit_early(engine, _number(name, value, 1))))
    if kind == "copy":
        bits = _number(name, value, 2)
        if bits not in (2, 3, 4, 8):
            raise UserError(f"a copy has 2, 3, 4 or 8 bits, not {bits}: give --draft copy:4")
        return ModelDraft(_copy_target(engine, bits))
    try:
        is_folder = Path(name).expanduser().is_dir()
    except (OSError, RuntimeError):  # too long a name, or nobody's home
        is_folder = False
    if not is_folder and "/" not in name:
        known = ("student", "early-exit:4", "lookup", "copy:4", "none")
        raise UserError(f"there is no draft {name!r}: choose {', '.join(DRAFTS)}{suggest(name, known)}")
    return ModelDraft(_load_smaller(engine, name), engine.target.vocabulary)


def _number(name: str, value: str, least: int) -> int:
    if not re.fullmatch(r"\d{1,9}", value) or int(value) < least:
        raise UserError(f"the draft {name!r} needs a number of {least} or more behind the colon")
    return int(value)


def _exit_early(engine: Engine, layers: int) -> Any:
    """Return a model of the target's first layers, with its embedding, final norm and head."""
    target = engine.target.model
    whole = decoder_layers(target)
    if not layers < len(whole):
        raise UserError(f"the target has {len(whole)} layers: exit after fewer, not {layers}")
    check_parts(target)
    config = type(target.config).from_dict(target.config.to_dict())
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    config._attn_implementation = target.config._attn_implementation
    with torch.device("meta"):
        model = type(target)(config).to(engine.target.dtype)
    place = layers_name(model)
    for name, module in target.named_modules():
        inside = name == place or name.startswith(f"{place}.")
        if (
            name
            and not inside
            and not any(child.startswith(f"{name}.") or child == name for child in [place])
        ):
            model.set_submodule(name, module)
    if engine.packed is None:
        model.set_submodule(place, nn.ModuleList(whole[:layers]))
    else:
        source = DiskSource(engine.packed)  # not a simulated link: it is read once
        for number, layer in enumerate(decoder_layers(model)):
            data = empty_buffer(source.nbytes(number))
            for _ in source.read(number, data):
                pass
            tensors = view_tensors(source.layout(number), data)
            own = {
                key: tensors[key].to(engine.target.device, each.dtype)
                for key, each in layer.state_dict().items()
            }
            layer.load_state_dict(own, assign=True)
    return model.eval().requires_grad_(False)


def _copy_target(engine: Engine, bits: int) -> Decoder:
    """Return the target with its layers in few bits, in RAM; embedding and head are the target's own."""
    packed = engine.packed or pack_model(engine.files, str(engine.target.dtype).removeprefix("torch."))
    engine._copy = copy = QuantizedSource(DiskSource(packed), bits)
    dtype = str(engine.target.dtype).removeprefix("torch.")
    model = load_without_layers(
        engine.files, share_rest(engine.target.model), dtype=dtype, device=str(engine.target.device)
    )
    return Decoder(model, engine.hold(WeightStore(copy, buffers=2, device=engine.target.device)))


def _load_smaller(engine: Engine, name: str) -> Decoder:
    files = find_language_model(name)
    if load_tokenizer(files).get_vocab() != engine.tokenizer.get_vocab():
        raise UserError(
            f"the draft {name!r} has another vocabulary than the target {engine.files.name!r}: "
            "a draft needs the target's own tokenizer"
        )
    dtype = str(engine.target.dtype).removeprefix("torch.")
    return Decoder(load_language_model(files, dtype=dtype, device=str(engine.target.device)))


# -- prompts -------------------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read JSONL rows that have `prompt` (a text) or `messages`. Raises UserError for another line."""
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not (
            isinstance(row.get("prompt"), str)
            if row.get("messages") is None
            else isinstance(row["messages"], list) and all(isinstance(each, dict) for each in row["messages"])
        ):
            raise UserError(f'{path}, line {number}: write {{"prompt": "…"}} or {{"messages": […]}}')
        if not is_utf8(row):
            raise UserError(f"{path}, line {number}: half of a surrogate pair is no character, leave it out")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no prompts")
    return rows


def encode_prompt(
    engine: Engine, row: dict[str, Any], raw: bool = False, system: str | None = None
) -> torch.Tensor:
    """Return a prompt's token ids [T]: through the model's chat template where it has one, unless `raw`."""
    tokenizer = engine.tokenizer
    messages = row.get("messages")
    if messages is None and (raw or tokenizer.chat_template is None):
        return torch.tensor(tokenizer(row["prompt"]).input_ids, dtype=torch.int64)
    if tokenizer.chat_template is None:
        raise UserError(f"{engine.files.name!r} has no chat template: give prompts, not messages")
    if messages is None:
        messages = [{"role": "user", "content": row["prompt"]}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is a program of the model's, and raises what it likes
        raise UserError(f"the model's chat template refuses the messages: {error}") from None
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)


def write_texts(
    engine: Engine,
    rows: Sequence[dict[str, Any]],
    *,
    sampling: Sampling | None = None,
    trees: Trees | None = None,
    max_new_tokens: int = 128,
    stop: Sequence[str] = (),
    raw: bool = False,
    system: str | None = None,
    batch: int = 1,
    on_text: Callable[[int, str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield what `llm generate --json` prints for each prompt, in order; `on_text` gets the text as it grows.

    Raises UserError, before anything is written, for a prompt that cannot be continued.
    """
    prompts = [encode_prompt(engine, row, raw, system) for row in rows]
    for number, prompt in enumerate(prompts, 1):
        try:
            check_texts(engine.target, engine.draft, [prompt], max_new_tokens)
        except UserError as error:
            raise UserError(f"prompt {number}: {error}" if len(rows) > 1 else str(error)) from None
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        read = engine.store.counters.bytes_read if engine.store else 0
        parts = [Parts(engine.tokenizer, stop) for _ in part]

        def show(row: int, tokens: list[int], start: int = start, parts: list[Parts] = parts) -> None:
            if on_text is not None and (text := parts[row].extend(tokens)):
                on_text(start + row, text)

        found = generate(
            engine.target, engine.draft, part, sampling=sampling, trees=trees, max_new_tokens=max_new_tokens,
            eos_token_ids=engine.eos_token_ids, stop=stop, tokenizer=engine.tokenizer, first=start,
            on_tokens=show if on_text else None,
        )  # fmt: skip
        bytes_read = (engine.store.counters.bytes_read if engine.store else 0) - read
        for number, made in enumerate(found):
            if on_text is not None and (rest := parts[number].cut(made.text or "")):
                on_text(start + number, rest)
            row = rows[start + number]
            yield describe_generated(engine, made, bytes_read) | {
                key: value for key, value in row.items() if key not in _MADE
            }


_MADE = (
    *("token_ids", "text", "target_passes", "draft_passes", "tokens_per_pass", "weight_bytes_read"),
    *("resident_peak_bytes", "seconds", "stop_reason"),
)


def describe_generated(engine: Engine, made: Generated, bytes_read: int) -> dict[str, Any]:
    """Return what is told of a text. Passes, bytes and seconds are those of its whole batch."""
    return {
        "token_ids": made.token_ids,
        "text": made.text,
        "target_passes": made.target_passes,
        "draft_passes": made.draft_passes,
        "tokens_per_pass": made.tokens_per_pass,
        "weight_bytes_read": bytes_read,
        "resident_peak_bytes": engine.resident_bytes(),
        "seconds": made.seconds,
        "stop_reason": made.stop_reason,
    }


# -- sizes ---------------------------------------------------------------------------------------------


def measure_engine(engine: Engine, most: int = 128, repeats: int = 2, fresh: bool = False) -> PassTimes:
    """Return the seconds of passes of the target as it stands in memory, and of the draft.

    Kept in the cache folder for this model, memory, draft, device and number of threads; measured anew where
    that is missing, or all should be `fresh`. What a simulated link gives is not kept.
    """
    sizes = [1, *(budget + 1 for budget in BUDGETS if budget <= most)]
    key = {
        "model": engine.files.hash,
        "memory": engine.memory,
        "placement": engine.placement and asdict(engine.placement),
        "draft": engine.draft_name,
        "device": str(engine.target.device),
        "dtype": str(engine.target.dtype),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "sizes": sizes,
    }
    from hashlib import sha256

    file = cache_folder("pass_times", f"{sha256(json.dumps(key).encode()).hexdigest()[:24]}.json")
    keep = engine.link is None
    if keep and not fresh and file.exists():
        try:
            found = json.loads(file.read_text())
            return PassTimes(*({int(n): s for n, s in found[who].items()} for who in ("target", "draft")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass  # measured again
    target = measure_passes(engine.target, sizes, repeats=repeats)
    draft = {1: 0.0, most + 1: 0.0}
    if isinstance(engine.draft, ModelDraft):
        draft = measure_passes(engine.draft.decoder, sizes, repeats=repeats)
    times = PassTimes(target, draft)
    if keep:
        with suppress(OSError):  # then they are measured again
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(key | asdict(times), indent=1).encode())
    return times


def plan_trees(engine: Engine, acceptance: Acceptance | None = None, measure: bool = False) -> dict[str, Any]:
    """Return the measured pass times, the table of tree sizes, and the choice: what `llm plan` prints."""
    began = time.perf_counter()
    times = measure_engine(engine, fresh=measure)
    acceptance = acceptance or Acceptance(known_acceptance(engine.draft_name))
    best, table = MeasuredSizer(times).table(acceptance)
    sizes = [asdict(size) | {"token_seconds": size.token_seconds} for size in table]
    return {
        "model": engine.files.name,
        "draft": engine.draft_name,
        "memory": engine.memory,
        "resident_bytes": engine.resident_bytes(),
        "resident_layers": len(engine.store.resident) if engine.store else None,
        "acceptance": acceptance.vector().tolist(),
        "target_seconds": times.target,
        "draft_seconds": times.draft,
        "table": sizes,
        "choice": asdict(best) | {"token_seconds": best.token_seconds},
        "seconds": time.perf_counter() - began,
    }


def known_acceptance(draft: str) -> list[float] | None:
    """Return the acceptance vector that a packaged draft was measured to have, None for others."""
    if draft != "student":
        return None
    from t2iprobe.llm.engine.student import FOLDER

    return json.loads((FOLDER / "config.json").read_text()).get("acceptance")


def choose_trees(
    engine: Engine, growth: str, budget: int | None, depth: int, verifier: str, batch: int = 1
) -> Trees:
    """Return how trees grow; without a budget, of the size that is measured to be the best.

    `batch` prompts share each pass: the more there are, the less room guesses have that cost nothing.
    """
    Trees(growth, budget or 0, depth, verifier)  # what is wrong is told before anything is measured
    acceptance = known_acceptance(engine.draft_name)
    if engine.draft is None or growth == "none":
        return Trees("none")
    size = MeasuredSizer(measure_engine(engine).shared(batch)) if budget is None else budget
    return Trees(growth, size, depth, verifier, acceptance)


def compare_trees(
    engine: Engine, rows: Sequence[dict[str, Any]], budgets: Sequence[int], max_new_tokens: int
) -> dict[str, Any]:
    """Write the same greedy texts with each kind of tree, in turn: what `llm bench` prints."""
    kinds = [("none", 0), *((growth, budget) for budget in budgets for growth in TREES[:3])]
    if engine.draft is None:
        kinds = kinds[:1]
    totals = {kind: {"tokens": 0, "passes": 0, "seconds": 0.0, "bytes": 0} for kind in kinds}
    acceptance = known_acceptance(engine.draft_name)
    for row in rows:
        for growth, budget in kinds:
            trees = Trees(growth, budget, acceptance=acceptance)
            (made,) = write_texts(engine, [row], trees=trees, max_new_tokens=max_new_tokens)
            total = totals[growth, budget]
            total["tokens"] += len(made["token_ids"])
            total["passes"] += made["target_passes"]
            total["seconds"] += made["seconds"]
            total["bytes"] += made["weight_bytes_read"]
    return {
        "model": engine.files.name,
        "draft": engine.draft_name,
        "memory": engine.memory,
        "prompts": len(rows),
        "trees": [
            {
                "tree": growth,
                "budget": budget,
                "tokens_per_pass": total["tokens"] / total["passes"],
                "seconds_per_token": total["seconds"] / total["tokens"],
                "bytes_per_token": total["bytes"] / total["tokens"],
            }
            for (growth, budget), total in totals.items()
        ],
    }

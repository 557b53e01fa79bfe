"""A file of prompts → a file of texts, in large blocks under a memory budget, continued if it was killed."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import Engine, encode_prompt, pack_model, read_prompts
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.engine.generation import Generated
from t2iprobe.llm.engine.processing import Sampling
from t2iprobe.llm.memory.ledger import Ledger, allocator_losses
from t2iprobe.llm.memory.packing import read_rest
from t2iprobe.llm.memory.placement import Placement, Realised
from t2iprobe.llm.memory.schedule import BlockReport, open_source, open_store, realise_weights, write_batches
from t2iprobe.llm.models import (
    DEFAULT_MODEL,
    cache_folder,
    find_language_model,
    load_tokenizer,
    load_without_layers,
)
from t2iprobe.llm.planning import choose_block
from t2iprobe.storage import explain_full_disk, open_exclusively, write_atomically

__all__ = ["Block", "write_file"]

# Which of a line's keys are ours: the others are the prompt's row's own.
_MADE = ("index", "token_ids", "text", "stop_reason")


@dataclass(frozen=True)
class Block:
    """What a person says of the blocks, None: what the planner chooses.

    batch: prompts of a forward; batches: those that share each load of a layer; bits: 4 for weights and
    cache, None for the dtype that is computed in.
    """

    batch: int | None = None
    batches: int | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("block", self.batches)):
            if value is not None and value < 1:
                raise UserError(f"a {name} has 1 or more, not {value}")
        if self.bits not in (None, 4):
            raise UserError(f"weights and cache are held as they are or in 4 bits, not in {self.bits}")


def write_file(
    prompts: Path,
    out: Path,
    *,
    model: str = DEFAULT_MODEL,
    block: Block | Placement | None = None,
    memory: int | None = None,
    link: float | None = None,
    disk: Path | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int = 128,
    stop: Sequence[str] = (),
    raw: bool = False,
    system: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    show: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write a text for each prompt to `out`: JSONL with index, prompt, token_ids, text and stop_reason.

    Args:
        prompts: JSONL with rows of prompt or messages.
        out: appended to block by block, in the prompts' order; what it holds of the same settings is kept.
        model: smollm2, a folder or a hub id.
        block: the placement, or what of it is not chosen by the planner.
        memory: bytes for all that the device holds: weights, caches, hidden states, logits.
        link: bytes a second of a simulated link to the weights.
        disk: a folder for caches and hidden states that do not fit; the cache folder's without.
        sampling: how tokens are drawn; each prompt has noise of its own, by its number in the file.
        max_new_tokens: of each prompt.
        stop: strings that end a text.
        raw: continue the text, without the chat template.
        system: what the model is told to be.
        dtype: of the computation.
        device: where.
        show: called with the texts that are there and all.

    Returns what was done: see `_summarize`. Raises UserError for a file of other settings, a budget that is
    too small, and whatever a prompt, a model or a disk does not allow.
    """
    sampling, block, disk = sampling or Sampling(), block or Block(), disk or cache_folder("blocks")
    rows = read_prompts(prompts)
    files = find_language_model(model)
    bits = (block.weight_bits, block.cache_bits) if isinstance(block, Placement) else (block.bits, block.bits)
    settings = {
        "model": files.hash,
        "prompts": hashlib.sha256(prompts.read_bytes()).hexdigest(),
        "sampling": asdict(sampling),
        "max_new_tokens": max_new_tokens,
        "stop": list(stop),
        "raw": raw,
        "system": system,
        "dtype": dtype,
        "bits": list(bits),
    }
    with ExitStack() as stack:
        file = stack.enter_context(open_exclusively(out))
        done = _continue(file, out, settings, len(rows))
        show(done, len(rows))
        if done == len(rows):
            return {"out": str(out), "prompts": len(rows), "done_before": done, "written": 0}
        ledger = Ledger({"device": memory})
        ledger.take("device", "the allocator's losses", 0 if memory is None else allocator_losses(memory))
        packed = pack_model(files, dtype, device)
        ledger.take("device", "embedding, last norm and head", packed.rest.nbytes)
        whole = load_without_layers(files, read_rest(packed), dtype=dtype, device=device)
        engine = Engine(files, load_tokenizer(files), Decoder(whole), memory=memory, packed=packed)
        texts = [encode_prompt(engine, row, raw, system) for row in rows[done:]]
        forecast = None
        if isinstance(block, Placement):
            placement = block
        else:
            lengths = [len(text) for text in texts]
            placement, forecast = choose_block(
                engine, block, lengths, max_new_tokens, link, disk=disk, sampled=sampling.temperature > 0
            )
        source = open_source(packed, placement.weight_bits, link)
        realised = realise_weights(placement, source)
        store = stack.enter_context(open_store(placement, source, device, ledger))
        stayed = sum(map(source.traffic, store.resident))  # read once, before

        def keep(found: list[tuple[int, Generated]]) -> None:
            lines = [_make_line(number, rows[number], made) for number, made in found]
            with explain_full_disk(out):
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
            show(found[-1][0] + 1, len(rows))

        began = time.perf_counter()
        report = write_batches(
            whole, store, placement, texts, sampling=sampling, max_new_tokens=max_new_tokens,
            eos_token_ids=engine.eos_token_ids, stop=stop, tokenizer=engine.tokenizer, first=done,
            ledger=ledger, disk=disk, realised=realised, on_results=keep,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        read = store.counters.bytes_read - stayed
        found = _summarize(placement, realised, report, ledger, read, seconds)
    return {
        "out": str(out), "prompts": len(rows), "done_before": done, "written": len(texts), **found,
        "budget_bytes": memory,
        "predicted_tokens_per_second": forecast and forecast.tokens_per_second,
    }  # fmt: skip


def _summarize(
    placement: Placement, realised: Realised, report: BlockReport, ledger: Ledger, read: int, seconds: float
) -> dict[str, Any]:
    """Return what was done: tokens and their speed, bytes of weights, memory by tier, the placement."""
    return {
        "tokens": report.tokens,
        "seconds": seconds,
        "prompt_seconds": report.prompt_seconds,
        "tokens_per_second": report.tokens / seconds,
        "passes": report.passes,
        "layer_loads": report.loads,
        "weight_bytes_read": read,
        "weight_bytes_per_token": read / report.tokens,
        "peak_bytes": ledger.peak,
        "peak_bytes_by_name": ledger.report(),
        "placement": {
            "batch": placement.batch,
            "batches": placement.batches,
            "block": placement.block,
            "weight_bits": placement.weight_bits,
            "cache_bits": placement.cache_bits,
            "cpu_attention": placement.cpu_attention,
            "asked": {name: asdict(getattr(placement, name)) for name in ("weights", "cache", "hidden")},
            "realised": {name: asdict(shares) for name, shares in realised.shares.items()},
        },
    }


def _make_line(number: int, row: dict[str, Any], made: Generated) -> str:
    found = {"index": number, "token_ids": made.token_ids, "text": made.text, "stop_reason": made.stop_reason}
    own = {key: value for key, value in row.items() if key not in _MADE}
    return json.dumps({"index": number, **own, **found}, ensure_ascii=False) + "\n"


def _continue(file: IO[bytes], path: Path, settings: dict[str, Any], total: int) -> int:
    """Return how many texts `file` holds of the same settings; a line that was not written whole is cut off.

    Raises UserError for a file of something else.
    """
    beside = path.with_name(f"{path.name}.settings.json")
    file.seek(0)
    content = file.read()
    if content:
        try:
            before = json.loads(beside.read_text())
        except (OSError, ValueError):
            raise UserError(
                f"{path} is there and {beside.name} is not: write elsewhere, or delete it"
            ) from None
        changed = sorted(
            key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key)
        )
        if changed:
            raise UserError(
                f"{path} was begun with another {changed[0].replace('_', ' ')}: write elsewhere, or delete it"
            )
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.splitlines()
    for number, line in enumerate(lines):
        try:
            right = json.loads(line)["index"] == number < total
        except (ValueError, LookupError, TypeError):
            right = False
        if not right:
            raise UserError(f"{path}, line {number + 1} is damaged: delete it and all behind it")
    if len(whole) < len(content):
        file.truncate(len(whole))
        os.fsync(file.fileno())
    if not content:
        write_atomically(beside, json.dumps(settings, indent=1, ensure_ascii=False).encode())
    return len(lines)

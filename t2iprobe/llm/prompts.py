"""Synsets → prompts that a language model writes, checked against the gloss, and written again if they fail.

A row of the JSONL is one prompt: `synset`, `prompt`, `span` (where the concept is named, [start, end)),
`scores` (see `faithfulness.Signals`), `accepted`, `faults`, `attempts`, `written` (False: the plain template,
since no attempt named the concept), `first` (the first attempt's scores and whether it passed).
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from t2iprobe import wordnet
from t2iprobe.errors import UserError
from t2iprobe.intervals import describe_difference, describe_probability
from t2iprobe.llm.commands import Engine, choose_trees, load_engine, write_texts
from t2iprobe.llm.engine.processing import Sampling
from t2iprobe.llm.faithfulness import (
    DEMONSTRATIONS,
    Limits,
    Signals,
    check_captions,
    find_span,
    name_synset,
)
from t2iprobe.llm.models import find_language_model
from t2iprobe.storage import explain_full_disk, read_lines, write_atomically

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import Synset

__all__ = ["EngineWriter", "ThroughputWriter", "Writer", "Writing", "find_synsets", "write_prompts"]

#: Synsets that are written, checked and stored together: what a kill can cost.
BLOCK = 16
Show = Callable[[int, int], None]


@dataclass(frozen=True)
class Writing:
    """How prompts are written: `rounds` times again what is rejected by `limits`."""

    per_synset: int = 8
    rounds: int = 2
    temperature: float = 0.9
    top_p: float = 0.95
    max_new_tokens: int = 48
    seed: int = 0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name, value, least in (("prompts a synset", self.per_synset, 1), ("rewrites", self.rounds, 0)):
            if value < least:
                raise UserError(f"{name}: {least} or more, not {value}")
        if self.temperature <= 0:
            raise UserError("prompts of one synset differ only where they are drawn: a temperature above 0")

    def sampling(self, seed: int) -> Sampling:
        """Return how tokens are drawn."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=seed)


class Writer(Protocol):
    """Whoever continues prompts, and checks what came of it."""

    def write(self, prompts: Sequence[str], writing: Writing, seed: int) -> list[str]:
        """Return one continuation a prompt, to the end of its line."""
        ...

    def check(self, captions: Sequence[tuple["Synset", str]], seed: int) -> list[Signals]:
        """Return the signals of captions."""
        ...


@dataclass
class EngineWriter:
    """Writes with an engine in memory, a few prompts a pass."""

    engine: Engine
    batch: int = 8
    growth: str = "best-first"
    budget: int | None = None

    def write(self, prompts: Sequence[str], writing: Writing, seed: int) -> list[str]:
        """Return one continuation a prompt, to the end of its line."""
        rows = [{"prompt": prompt} for prompt in prompts]
        made = write_texts(
            self.engine,
            rows,
            sampling=writing.sampling(seed),
            trees=choose_trees(self.engine, self.growth, self.budget, 24, "auto", self.batch),
            max_new_tokens=writing.max_new_tokens,
            stop=["\n"],
            raw=True,
            batch=self.batch,
        )
        return [each["text"] for each in made]

    def check(self, captions: Sequence[tuple["Synset", str]], seed: int) -> list[Signals]:
        """Return the signals of captions."""
        return check_captions(self.engine, captions, seed=seed)


@dataclass
class ThroughputWriter:
    """Writes large blocks under a memory budget (see `throughput.py`), by files beside `out`."""

    out: Path
    model: str
    memory: int | None = None
    link: int | None = None
    dtype: str = "auto"
    device: str = "cpu"

    def write(self, prompts: Sequence[str], writing: Writing, seed: int) -> list[str]:
        """Return one continuation a prompt, to the end of its line. A killed call goes on where it was."""
        from t2iprobe.llm.throughput import write_file

        asked, texts = (self.out.with_name(f".{self.out.name}.{seed}.{end}") for end in ("prompts", "texts"))
        lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        write_atomically(asked, lines.encode())
        write_file(
            asked,
            texts,
            model=self.model,
            memory=self.memory,
            link=self.link,
            sampling=writing.sampling(seed),
            max_new_tokens=writing.max_new_tokens,
            stop=["\n"],
            raw=True,
            dtype=self.dtype,
            device=self.device,
        )
        found = [json.loads(line)["text"] for line in read_lines(texts)]
        for path in self.out.parent.glob(f".{self.out.name}.{seed}.*"):
            path.unlink()
        return found

    def check(self, captions: Sequence[tuple["Synset", str]], seed: int) -> list[Signals]:
        """Return the signals of captions."""
        with load_engine(
            self.model, "none", memory=self.memory, link=self.link, dtype=self.dtype, device=self.device
        ) as engine:
            return check_captions(engine, captions, seed=seed)


def find_synsets(text: str) -> list["Synset"]:
    """Return the synsets of names, wnids or lemmas by commas, or of files with one a line.

    Raises UserError for a name that WordNet does not have, and for a synset that is no noun's.
    """
    names: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if part and Path(part).is_file():
            try:
                lines = Path(part).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read synsets from {part}: {error}") from None
            names += [line.strip() for line in lines if line.strip()]
        elif part:
            names.append(part)
    found = list(dict.fromkeys(wordnet.synset(name) for name in names))
    if not found:
        raise UserError("name synsets by commas, or a file with one a line")
    if verb := next((synset for synset in found if synset.pos() != "n"), None):
        raise UserError(f"{verb.name()} is not a noun's: pictures show nouns")
    return found


def ask_for(synset: "Synset") -> str:
    """Return the prompt whose continuation is a caption: a few demonstrations, word and meaning."""
    shown = "".join(
        f"Word: {word}\nMeaning: {gloss}\nCaption: {caption}\n\n"
        for word, gloss, caption in DEMONSTRATIONS[:2]
    )
    return f"{shown}Word: {name_synset(synset)}\nMeaning: {synset.definition()}\nCaption:"


def clean_caption(text: str) -> str:
    """Return a continuation as a caption: its first line, without quotes, to the end of a sentence if cut."""
    line = next((line for line in text.strip().splitlines()), "").strip().strip("\"'“”").strip()
    if line and line[-1] not in ".!?" and "." in line:
        line = line[: line.rindex(".") + 1]
    return line


# -- writing -------------------------------------------------------------------------------------------


@dataclass
class _Slot:
    """One prompt that is wanted, with the best attempt so far."""

    synset: "Synset"
    attempts: int = 0
    first: dict[str, Any] = field(default_factory=dict)
    caption: str = ""
    signals: Signals | None = None
    faults: list[str] = field(default_factory=lambda: ["not written"])

    def offer(self, caption: str, signals: Signals, faults: list[str]) -> None:
        """Take an attempt if it has fewer faults, or as many and a greater gloss PMI."""
        self.attempts += 1
        if self.attempts == 1:
            self.first = {"accepted": not faults, "gloss_pmi": signals.gloss_pmi, "isa": signals.isa}
        if self.signals is None or (-len(faults), signals.gloss_pmi) > (
            -len(self.faults),
            self.signals.gloss_pmi,
        ):
            self.caption, self.signals, self.faults = caption, signals, faults


def write_prompts(
    synsets: Sequence["Synset"],
    out: Path,
    writer: Writer,
    writing: Writing,
    *,
    model: str,
    block: int | None = BLOCK,
    show: Show = lambda done, total: None,
) -> dict[str, Any]:
    """Write `writing.per_synset` prompts for each synset to the JSONL `out`, and return what was done.

    Args:
        synsets: nouns.
        out: what it holds of the same settings is kept, so that a killed call goes on.
        writer: the engine.
        writing: how.
        model: its name, since a file of another model's prompts is not continued.
        block: synsets that are stored together; None: all.
        show: called with the prompts that are there and all.

    Raises UserError where `out` was begun with other settings, or is damaged.
    """
    began, size = time.perf_counter(), block or len(synsets)
    names = [synset.name() for synset in synsets]
    settings = json.loads(json.dumps(asdict(writing))) | {
        "model": find_language_model(model).hash,
        "synsets": names,
        "block": size,
    }
    with explain_full_disk(out):
        rows = _continue(out, settings, size * writing.per_synset)
        before = len(rows)
        show(before, len(names) * writing.per_synset)
        for start in range(before // writing.per_synset, len(names), size):
            slots = _fill(synsets[start : start + size], writer, writing, start)
            rows += [_make_row(slot) for slot in slots]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(out, text.encode())
            show(len(rows), len(names) * writing.per_synset)
    return {
        "out": str(out),
        "synsets": len(names),
        "done_before": before,
        "seconds": time.perf_counter() - began,
        **summarise_prompts(rows),
    }


def _fill(synsets: Sequence["Synset"], writer: Writer, writing: Writing, start: int) -> list[_Slot]:
    """Write the prompts of a block: all of them once, then what is rejected again."""
    slots = [_Slot(synset) for synset in synsets for _ in range(writing.per_synset)]
    for attempt in range(writing.rounds + 1):
        open_slots = [slot for slot in slots if slot.faults]
        if not open_slots:
            break
        noise = _derive_seed(writing.seed, start, attempt)
        texts = writer.write([ask_for(slot.synset) for slot in open_slots], writing, noise)
        captions = [clean_caption(text) for text in texts]
        checked = [(slot.synset, caption) for slot, caption in zip(open_slots, captions, strict=True)]
        found = iter(writer.check([pair for pair in checked if pair[1]], writing.seed))
        taken = {(slot.synset, slot.caption) for slot in slots if not slot.faults}
        for slot, (synset, caption) in zip(open_slots, checked, strict=True):
            if not caption:
                slot.attempts += 1
                slot.first = slot.first or {"accepted": False, "gloss_pmi": None, "isa": None}
                continue
            signals = next(found)
            faults = signals.faults(writing.limits)
            if find_span(caption, synset) is None:
                faults.append(f"does not name {name_synset(synset)}")
            if (synset, caption) in taken:
                faults.append("said before")
            slot.offer(caption, signals, faults)
            if not slot.faults:
                taken.add((synset, slot.caption))
    _fall_back(slots, writer, writing)
    return slots


def _fall_back(slots: Sequence[_Slot], writer: Writer, writing: Writing) -> None:
    """Let the plain template stand where no attempt named the concept."""
    lacking = [slot for slot in slots if slot.signals is None or find_span(slot.caption, slot.synset) is None]
    if not lacking:
        return
    plain = []
    for slot in lacking:
        name = name_synset(slot.synset)
        plain.append((slot.synset, f"A photo of {wordnet.choose_article(name)} {name}."))
    for slot, (_, caption), signals in zip(lacking, plain, writer.check(plain, writing.seed), strict=True):
        slot.caption, slot.signals, slot.faults = caption, signals, ["the plain template"]


def _make_row(slot: _Slot) -> dict[str, Any]:
    assert slot.signals is not None
    span = find_span(slot.caption, slot.synset)
    assert span is not None
    return {
        "synset": slot.synset.name(),
        "prompt": slot.caption,
        "span": list(span),
        "scores": asdict(slot.signals),
        "accepted": not slot.faults,
        "faults": slot.faults,
        "attempts": slot.attempts,
        "written": slot.faults != ["the plain template"],
        "first": slot.first,
    }


def summarise_prompts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how many prompts pass at first and in the end, and whether is-a rose, which is not chosen by.

    The gain in what prompts are chosen by is a choice's own; that in a signal that plays no part is not.
    """
    accepted = np.array([row["accepted"] for row in rows], float)
    first = np.array([row["first"]["accepted"] for row in rows], float)
    both = [row for row in rows if row["first"]["isa"] is not None and row["scores"]["isa"] is not None]
    return {
        "prompts": len(rows),
        "attempts": sum(row["attempts"] for row in rows),
        "accepted_first": describe_probability(first),
        "accepted": describe_probability(accepted),
        "plain_templates": sum(not row["written"] for row in rows),
        "isa_gain": describe_difference(
            [row["first"]["isa"] for row in both], [row["scores"]["isa"] for row in both]
        )
        if both
        else None,
    }


def _derive_seed(seed: int, start: int, attempt: int) -> int:
    digest = hashlib.sha256(f"{seed}/{start}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _continue(out: Path, settings: dict[str, Any], whole: int) -> list[dict[str, Any]]:
    """Return the rows of `out` that were written with the same settings, whole blocks of `whole` rows.

    Raises UserError for a file of something else.
    """
    beside = out.with_name(f"{out.name}.settings.json")
    if not out.exists():
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(beside, json.dumps(settings, indent=1, ensure_ascii=False).encode())
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}") from None
        return []
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in read_lines(out)]
        names = [row["synset"] for row in rows]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"{out} was not written by this command, or it is damaged: delete it, or write elsewhere"
        ) from None
    changed = sorted(key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key))
    if changed:
        raise UserError(
            f"{out} was begun with another {changed[0].replace('_', ' ')}: write elsewhere, or delete it"
        )
    per_synset = settings["per_synset"]
    wanted = [name for name in settings["synsets"] for _ in range(per_synset)]
    if names != wanted[: len(names)] or (len(names) % whole and len(names) < len(wanted)):
        raise UserError(f"{out} is damaged: delete it, or write elsewhere")
    return rows

"""What the language engine's benchmarks share: the target's own texts, kept results, ratios, verdicts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2iprobe.errors import UserError
from t2iprobe.intervals import RESAMPLES, bootstrap_means, interval
from t2iprobe.llm.commands import Engine, encode_prompt, read_prompts
from t2iprobe.llm.engine.drafts import Draft, LookupDraft, ModelDraft, Request
from t2iprobe.llm.engine.processing import Processing, Sampling
from t2iprobe.llm.engine.sizing import WIDTH
from t2iprobe.llm.engine.tree import make_tree
from t2iprobe.llm.models import find_language_model, load_tokenizer
from t2iprobe.storage import hash_files, write_atomically

PROMPTS = Path(__file__).with_name("prompts.jsonl")
OTHER_TASKS = ("general", "task", "plain")  # all others are prompt writing
TIE = 1e-3  # of the two best logits: either may be the greatest, by how the sum was ordered
KEPT = 2 * WIDTH  # a draft's guesses that are recorded; no shape has children of a higher rank than WIDTH


def tell(line: str) -> None:
    """Say something about the progress, where results do not go."""
    print(line, file=sys.stderr, flush=True)


class Kept(dict[str, Any]):
    """Results in a JSON file, written whenever one is put."""

    def __init__(self, path: Path) -> None:
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self._path = path

    def put(self, key: str, value: Any) -> None:
        """Keep a result, also if the next moment is the last."""
        self[key] = value
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(self).encode())


def check_identity(work: Path, identity: Mapping[str, Any]) -> None:
    """Raise UserError where a folder holds another benchmark. It may get further `drafts`."""
    work.mkdir(parents=True, exist_ok=True)
    path, drafts = work / "identity.json", identity.get("drafts", {})
    if path.exists():
        before = json.loads(path.read_text())
        known = before.get("drafts", {})
        if {**before, "drafts": {}} != {**identity, "drafts": {}} or known | drafts != drafts | known:
            raise UserError(
                f"{work} holds a benchmark of another model or other settings: give another --work"
            )
        drafts = known | drafts
    write_atomically(path, json.dumps({**identity, "drafts": drafts}, indent=1).encode())


def identify_draft(name: str) -> str:
    """Return what tells a draft from others of its name."""
    if name == "student":
        from t2iprobe.llm.engine.student import FOLDER

        if not (FOLDER / "config.json").exists():
            raise UserError("the student has not been taught yet: give other --drafts")
        return hash_files({name: FOLDER / name for name in ("config.json", "model.safetensors")})
    if name == "lookup" or name.partition(":")[0] in ("early-exit", "copy"):
        return name
    return find_language_model(name).hash


# -- texts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A prompt's task and number within it, its ids, and what the target writes: ids, gaps of the logits."""

    task: str
    number: int
    prompt: list[int]
    tokens: list[int]
    gaps: list[float]

    @property
    def ids(self) -> Tensor:
        """Prompt and text, int64 [T]."""
        return torch.tensor(self.prompt + self.tokens)

    @property
    def begin(self) -> Tensor:
        """The prompt, int64 [T]."""
        return torch.tensor(self.prompt)


def choose_rows(path: Path, per_task: int) -> list[tuple[int, dict[str, Any]]]:
    """Return the first prompts of each task with their numbers within it, the first of all tasks first."""
    seen: dict[str, int] = {}
    found = []
    for row in read_prompts(path):
        number = seen[row.get("task", "")] = seen.get(row.get("task", ""), -1) + 1
        if number < per_task:
            found.append((number, row))
    return sorted(found, key=lambda each: each[0])


def write_texts_plainly(
    engine: Engine, rows: Sequence[tuple[int, dict[str, Any]]], most: int, eos: Sequence[int], kept: Kept
) -> list[Text]:
    """Return what Transformers' own greedy decoding writes after each prompt."""
    for place, (number, row) in enumerate(rows):
        if str(place) in kept:
            continue
        tell(f"the target's own text {place + 1} of {len(rows)}")
        prompt = encode_prompt(engine, row)
        made = decode(engine.target.model, prompt, most, eos, output_logits=True)
        tokens = made.sequences[0, len(prompt) :].tolist()
        best = [logits[0].double().topk(2).values for logits in made.logits]
        gaps = [float(first - second) for first, second in best]
        text = Text(row.get("task", ""), number, prompt.tolist(), tokens, gaps)
        kept.put(str(place), asdict(text))
    return [Text(**kept[str(place)]) for place in range(len(rows))]


def decode(model: Any, prompt: Tensor, most: int, eos: Sequence[int], **more: Any) -> Any:
    """Return what Transformers' greedy `generate` makes of prompts, int64 [T] or [B, T].

    Without `eos`, it goes on.
    """
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=list(eos) or None,
        pad_token_id=eos[0] if eos else 0,
        return_dict_in_generate=True,
        **{name: more.pop(name) for name in ("output_logits", "prompt_lookup_num_tokens") if name in more},
    )
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None  # it would stand in for a missing one
    prompts = prompt if prompt.ndim > 1 else prompt[None]
    ids = prompts.to(model.get_input_embeddings().weight.device)
    if ids.device.type == "meta":  # the weights are elsewhere
        ids = prompts
    try:
        with torch.no_grad():
            return model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings, **more
            )
    finally:
        model.generation_config.eos_token_id = own


@contextmanager
def count_passes(*models: Any) -> Iterator[list[int]]:
    """Count how often each model runs."""
    counts = [0] * len(models)

    def count(place: int) -> Callable[..., None]:
        def add(*_: Any) -> None:
            counts[place] += 1

        return add

    hooks = [model.register_forward_pre_hook(count(place)) for place, model in enumerate(models)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def compare_texts(text: Text, tokens: Sequence[int], whole: bool = True) -> dict[str, Any] | None:
    """Return where `tokens` leave the target's own text, and the gap of its logits there; None if nowhere.

    Not `whole`: only what both have is compared.
    """
    own, other = text.tokens, list(tokens)
    for place, (wanted, found) in enumerate(zip(own, other, strict=False)):
        if wanted != found:
            return {"at": place, "gap": text.gaps[place]}
    return {"at": min(len(own), len(other)), "gap": None} if whole and len(own) != len(other) else None


def judge_texts(differences: Sequence[Mapping[str, Any] | None], what: str) -> dict[str, Any]:
    """Return the verdict on texts that should all be the target's own."""
    found = [each for each in differences if each is not None]
    ties = [each for each in found if each["gap"] is not None and each["gap"] < TIE]
    detail = f"{len(differences)} texts, {len(differences) - len(found)} equal token for token"
    if ties:
        gaps = ", ".join(f"{each['gap']:.1e}" for each in ties)
        detail += f", {len(ties)} leave it at a tie (gaps {gaps})"
    if others := [each for each in found if each not in ties]:
        detail += f", {len(others)} differ: {others[:3]}"
    return {"claim": f"{what} but for ties under {TIE:g}", "holds": not others, "detail": detail}


# -- how often a draft is right ------------------------------------------------------------------------


@dataclass(frozen=True)
class Guesses:
    """What a draft, told the target's own text, guesses next: tokens int64 and log q float64 [n, KEPT]."""

    tokens: Tensor
    log_q: Tensor

    def ranks(self, text: Text) -> Tensor:
        """Return at which rank each token of the text was guessed, KEPT where it was not: int64 [n]."""
        hits = (self.tokens == torch.tensor(text.tokens)[:, None]) & self.log_q.isfinite()
        return torch.where(hits.any(1), hits.int().argmax(1), KEPT)


def record_guesses(draft: Draft, text: Text) -> Guesses:
    """Let a draft guess every token of a text (teacher forcing)."""
    if isinstance(draft, ModelDraft):
        ids, count = text.ids[:-1], len(text.tokens)
        size = len(ids)
        mask = torch.ones(1, size, size, dtype=torch.bool).tril()
        cache = draft.decoder.new_cache(1, size)
        logits = draft.decoder.forward(ids[None], torch.arange(size)[None], mask, cache, keep=count)[0]
        log_q = Processing(Sampling())(logits.cpu(), ())
    else:
        log_q = torch.stack(list(_guess_step_by_step(draft, text)))
    best = log_q.topk(min(KEPT, log_q.shape[1]))
    return Guesses(best.indices, best.values)


def _guess_step_by_step(draft: Draft, text: Text) -> Iterator[Tensor]:
    draft.begin([text.begin])
    root, processing = text.prompt[-1], Processing(Sampling())
    for token in text.tokens:
        tree = make_tree([root], [-1])
        yield draft.expand([Request(0, tree, torch.tensor([0]))], processing)[0][0]
        draft.accept(0, tree, [], token)
        draft.settle()
        root = token


def acceptance_vector(ranks: Sequence[Tensor]) -> list[float]:
    """Return how often the token was the guess of each rank, [WIDTH], over the positions of all texts."""
    every = torch.cat(list(ranks))
    return (every.bincount(minlength=KEPT + 1)[:WIDTH] / len(every)).tolist()


def is_recorded(draft: Draft | None) -> bool:
    """Whether the draft's guesses at a place depend on the text before it only, not on the round."""
    return draft is not None and not isinstance(draft, LookupDraft)


# -- ratios and verdicts -------------------------------------------------------------------------------


def describe_ratio(values: Sequence[Sequence[float]], ratio: Callable[..., Any]) -> dict[str, Any]:
    """Return `ratio` of the columns' sums of values [N, M], with its bootstrap interval over the N rows.

    `ratio` is called with M arrays: sums, or the means of resamples.
    """
    rows = np.asarray(values, np.float64)
    replicates = bootstrap_means(rows, RESAMPLES, np.random.default_rng(0))
    ends = interval(ratio(*replicates.T)) if len(rows) > 1 else None
    return {"value": float(ratio(*rows.sum(0))), "interval": None if ends is None else list(ends)}


def judge_least(claim: str, found: Mapping[str, Any], least: float, detail: str = "") -> dict[str, Any]:
    """Return {claim, holds, sure, detail}: sure if all of the interval holds."""
    ends = found["interval"]
    return {
        "claim": claim,
        "holds": found["value"] >= least,
        "sure": ends is not None and ends[0] >= least,
        "detail": f"{show(found)}{detail}",
    }


def list_verdicts(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the verdicts as Markdown."""
    lines = []
    for verdict in verdicts:
        answer = "**yes**" if verdict["holds"] else "**no**"
        if verdict["holds"] and not verdict.get("sure", True):
            answer += ", but the interval begins below"
        lines.append(f"- {verdict['claim']}: {answer} ({verdict['detail']})")
    return lines


def show(cell: Mapping[str, Any], form: str = ".2f") -> str:
    """Return a value and its interval."""
    if cell["interval"] is None:
        return f"{cell['value']:{form}}"
    return f"{cell['value']:{form}} [{cell['interval'][0]:{form}}, {cell['interval'][1]:{form}}]"


# -- the command as a process --------------------------------------------------------------------------


def run_command(words: Sequence[str], until: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Run `t2iprobe` with these words in a process of its own, killed by SIGKILL as soon as `until` says so.

    Returns its status, output, error, seconds, the most resident memory that it had, and whether it was
    killed.
    """
    killed, began = False, time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as error:
        process = subprocess.Popen([sys.executable, "-m", "t2iprobe", *words], stdout=output, stderr=error)
        try:
            while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                if not killed and until():
                    process.send_signal(signal.SIGKILL)
                    killed = True
                time.sleep(0.02)
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        output.seek(0)
        error.seek(0)
        return {
            "status": process.returncode,
            "output": output.read(),
            "error": error.read(),
            "seconds": time.perf_counter() - began,
            "peak_bytes": ended[2].ru_maxrss * 1024,
            "killed": killed and process.returncode == -signal.SIGKILL,
        }


def save_weightless(model: str, folder: Path) -> Path:
    """Save a model of the same family and tokenizer, of one tiny layer: a process without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    files = find_language_model(model)
    config = AutoConfig.from_pretrained(files.folder)
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    for name, value in (tiny | {"num_key_value_heads": 1, "head_dim": 16, "layer_types": None}).items():
        if hasattr(config, name):
            setattr(config, name, value)
    loader: Any = AutoModelForCausalLM
    loader.from_config(config).float().save_pretrained(folder)
    load_tokenizer(files).save_pretrained(folder)
    return folder

"""The training loop: one objective, several concepts in one pass; killed and continued anywhere.

    OUT/settings.json      what every number depends on; the same command continues, another is refused
    OUT/state.safetensors  the last state, until the end (metadata: step, curve, seconds)
    OUT/training.json      the outcome: what stopped it, when and why, and the whole curve
    OUT/learned_embeds.safetensors and the method's own weights
    OUT/grids/step_000100/*.png   pictures drawn on the way

All randomness is a hash of (seed, token, step): nothing but the state needs to be kept.
"""

import contextlib
import datetime
import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from t2iprobe.errors import UserError
from t2iprobe.inversion.backbones import Backbone
from t2iprobe.inversion.concepts import Concept, Moments, encode_moments
from t2iprobe.inversion.drawing import Broken, draw_pictures, write_pictures
from t2iprobe.inversion.embeddings import token_parts
from t2iprobe.inversion.folders import check_folder, claim_folder
from t2iprobe.inversion.initialization import initialise
from t2iprobe.inversion.learner import Learner
from t2iprobe.inversion.memory import TooLarge, explain_lack_of_memory
from t2iprobe.inversion.methods import Method, find_method
from t2iprobe.inversion.objective import denoising_losses
from t2iprobe.inversion.settings import Training
from t2iprobe.machine import list_versions
from t2iprobe.storage import explain_full_disk, hash_files, write_atomically

if TYPE_CHECKING:
    from t2iprobe.inversion.features import Features

SCHEMA = "t2iprobe.training/1"
MAX_TOKENS = 77  # of a prompt, in every text encoder that takes rows
PRIOR_TEMPLATE = "a photo of a {}"
Progress = Callable[[int, int], None]


def train_concepts(
    backbone: Backbone,
    jobs: Sequence[tuple[Concept, Path]],
    settings: Training,
    *,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train concepts, each into its own folder, or continue what is there. Returns their training.json.

    With textual inversion up to `together` of them share each pass of the denoiser; one that has converged
    leaves it to the next that waits.
    Raises UserError where a folder holds another training, or a loss is not a number (the last good rows
    are then written all the same).
    """
    outcomes = train_jobs(backbone, jobs, settings, progress=progress)
    refuse_broken(outcomes)
    return outcomes


def train_jobs(
    backbone: Backbone,
    jobs: Sequence[tuple[Concept, Path]],
    settings: Training,
    *,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Do what `train_concepts` does, and leave it to the caller to look for losses that are not a number."""
    method_class = find_method(settings.method)
    method_class.check(backbone)
    if len({concept.token for concept, _ in jobs}) < len(jobs):
        raise UserError("two concepts have the same token: name them apart")
    if not method_class.shares_pass and len(jobs) > 1:
        return [train_jobs(backbone, [job], settings, progress=progress)[0] for job in jobs]
    identities = {out: identify(settings, concept) for concept, out in jobs}
    done = {out: found for _, out in jobs if (found := find_finished(out, identities[out]))}
    missing = [(concept, out) for concept, out in jobs if out not in done]
    if missing:
        done |= _train(backbone, missing, settings, method_class, identities, progress)
    return [done[out] for _, out in jobs]


def refuse_broken(outcomes: Sequence[dict[str, Any]]) -> None:
    """Raise UserError where a loss was not a number."""
    broken = [found for found in outcomes if found["stop"]["rule"] == "nan"]
    if broken:
        names = ", ".join(found["token"] for found in broken)
        raise UserError(
            f"{names}: {broken[0]['stop']['reason']}; "
            "try smaller rates (--row-rate, --rate) or --dtype float32, with another --out"
        )


def identify(settings: Training, concept: Concept, model: str | None = None) -> dict[str, Any]:
    """Return what every number of a training depends on; `model` is its hash where it lies elsewhere."""
    from t2iprobe.pipelines import model_hash

    chosen = json.loads(settings.model_dump_json(exclude={"grid", "evaluate", "device", "together"}))
    return {
        "token": concept.token,
        "model_hash": model or model_hash(settings.model, variant=settings.variant),
        "pictures": hash_pictures(concept),
        "captions": list(concept.captions or ()),
        "settings": chosen,
    }


def hash_pictures(concept: Concept) -> str:
    """Return the hash of a concept's picture files and their names."""
    return hash_files({path.name: path for path in concept.files})


def find_finished(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return a folder's outcome, None where there is none yet. Raises UserError for another training's."""
    check_folder(out, identity, "training", ("training.json", "state.safetensors"))
    if not (out / "training.json").exists():
        return None
    outcome = read_outcome(out)
    page = out / "report.html"
    if not page.exists() or page.stat().st_mtime_ns < (out / "training.json").stat().st_mtime_ns:
        _write_page(out)  # a kill came between the two
    return outcome


def read_outcome(out: Path) -> dict[str, Any]:
    """Read a finished training. Raises UserError where there is none, or it is damaged."""
    path = out / "training.json"
    try:
        outcome = json.loads(path.read_text(encoding="utf-8"))
        whole = outcome["schema"] == SCHEMA and outcome["stop"]["rule"] and outcome["settings"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{out} holds no finished training: it has no training.json") from None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged: remove it, and the same command trains again")
    return outcome


def _train(
    backbone: Backbone,
    jobs: Sequence[tuple[Concept, Path]],
    settings: Training,
    method_class: type[Method],
    identities: dict[Path, dict[str, Any]],
    progress: Progress | None,
) -> dict[Path, dict[str, Any]]:
    _check_features(backbone, settings)
    prior = _make_prior(backbone, settings)
    tokens = {concept.token: settings.vectors for concept, _ in jobs}
    method = method_class(backbone, tokens, settings.rank, settings.seed)
    try:
        for concept, _ in jobs:
            _check_room(method, concept)

        def start(concept: Concept, out: Path) -> Learner:
            learner = _make_learner(backbone, concept, out, settings, method, prior, identities[out])
            claim_folder(out, learner.identity)  # whatever the input lacks was told before
            learner.restore()
            return learner

        if settings.compile:
            backbone.denoiser.compile_repeated_blocks()
        return _run(backbone, jobs, start, settings.together, progress)
    finally:
        method.remove()


def _make_learner(
    backbone: Backbone,
    concept: Concept,
    out: Path,
    settings: Training,
    method: Method,
    prior: tuple[Concept, Moments] | None,
    identity: dict[str, Any],
) -> Learner:
    """Return a learner whose rows are initialised; the time that takes is part of its training's."""
    began = time.perf_counter()
    moments = _on(encode_moments(backbone, concept), backbone.device)
    learner = Learner(concept, out, settings, method, moments, prior, identity)
    learner.initial = initialise(
        backbone, method.rows, concept, moments, settings.init, settings.seed, settings.flip,
        key=identity["model_hash"],
    )  # fmt: skip
    learner.seconds = time.perf_counter() - began
    learner.begin()
    return learner


@lru_cache(maxsize=1)
def _load_features(spec: str, device: str, dtype: str) -> "Features":
    """Load what compares pictures, once for all looks of the clip rule."""
    from t2iprobe.inversion.features import load_features

    return load_features(spec, device, dtype)


def _check_features(backbone: Backbone, settings: Training) -> None:
    """Load what compares pictures, to tell before a training what would be told after it."""
    if settings.features != "auto" and (settings.evaluate or settings.stop == "clip"):
        _load_features(settings.features, str(backbone.device), backbone.dtype)


def _check_room(method: Method, concept: Concept) -> None:
    """Raise UserError for a caption of which a text encoder reads so little that the token is cut off."""
    rows = method.rows
    last = token_parts(concept.token, rows.tokens[concept.token])[-1]
    for tokenizer, _ in method.backbone.encoders.values():
        for caption in concept.captions or concept.templates:
            text = rows.expand(caption.replace("{}", concept.token))
            length = min(MAX_TOKENS, tokenizer.model_max_length)
            ids = tokenizer(text, truncation=True, max_length=length).input_ids
            if tokenizer.convert_tokens_to_ids(last) not in ids:
                raise UserError(
                    f"the caption {_short(caption)!r} is too long: of the {length} tokens that are read "
                    f"none is left for {last}"
                )


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}…"


def _on(moments: Moments, device: torch.device) -> Moments:
    return Moments(moments.mean.to(device), moments.std.to(device))


def check_prior(settings: Training) -> None:
    """Raise UserError for a prior that the method has no use for."""
    method = find_method(settings.method)
    if settings.prior is not None and not method.uses_prior:
        raise UserError(f"{method.name} changes nothing but the token: leave --prior out")


def _make_prior(backbone: Backbone, settings: Training) -> tuple[Concept, Moments] | None:
    """Draw the pictures of the prior's word with the untrained model (DreamBooth, §3.2)."""
    check_prior(settings)
    if settings.prior is None:
        return None
    prompt = PRIOR_TEMPLATE.replace("{}", settings.prior)
    seeds = [settings.seed * 1_000_003 + number for number in range(settings.prior_pictures)]
    drawn = draw_pictures(backbone, [prompt] * len(seeds), seeds, settings.steps, settings.guidance)
    concept = Concept(
        token=settings.prior,
        pictures=torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous(),
        files=(),
        templates=(PRIOR_TEMPLATE,),  # what they were drawn from
    )
    return concept, _on(encode_moments(backbone, concept), backbone.device)


def _run(
    backbone: Backbone,
    jobs: Sequence[tuple[Concept, Path]],
    start: Callable[[Concept, Path], Learner],
    together: int,
    progress: Progress | None,
) -> dict[Path, dict[str, Any]]:
    """Train until every concept has stopped; each is written then. Returns out → training.json.

    Up to `together` share a pass; where one has stopped, the next that waits takes its place.
    """
    outcomes: dict[Path, dict[str, Any]] = {}
    waiting, active = deque(jobs), list[Learner]()
    most = 0
    while waiting or active:
        while waiting and len(active) < together:
            learner = start(*waiting.popleft())
            if not learner.curve:
                _look(backbone, [learner])
                if learner.stopped is None:
                    _draw_grid(backbone, learner)
            if learner.stopped is None:
                active.append(learner)
            else:  # its first loss is not a number
                outcomes[learner.out] = _finish(backbone, learner)
        if not active:
            break
        began = time.perf_counter()
        _step(backbone, active)
        due = [learner for learner in active if learner.due]
        if due:
            _look(backbone, due)
        elapsed = time.perf_counter() - began
        for learner in active:
            learner.seconds += elapsed / len(active)
        for learner in due:
            if learner.stopped is not None:
                outcomes[learner.out] = _finish(backbone, learner)
            else:
                if _is_grid_step(learner):
                    _draw_grid(backbone, learner)
                learner.store()
        most = max(most, *(learner.step for learner in active))
        if progress is not None:
            progress(most, active[0].cap)
        active = [learner for learner in active if learner.stopped is None]
    return outcomes


def _explain_step(backbone: Backbone) -> contextlib.AbstractContextManager[None]:
    advice = "lower --together, batch (--set batch=1) or size (--set size=…), or take a larger device"
    return explain_lack_of_memory(backbone.device, "a training step", advice)


def _step(backbone: Backbone, active: Sequence[Learner]) -> None:
    """One step of every active learner, in one pass."""
    with _explain_step(backbone):
        inputs = [learner.training_inputs() for learner in active]
        moments = [moment for learner in active for moment in learner.training_moments()]
        flat = [each for group in inputs for each in group]
        rows = active[0].method.rows
        prompts = [rows.expand(caption) for each in flat for caption in each.captions]
        losses = denoising_losses(backbone, moments, flat, prompts)
        parts = losses.split([sum(len(each.captions) for each in group) for group in inputs])
        total = torch.stack(
            [learner.training_loss(part) for learner, part in zip(active, parts, strict=True)]
        ).sum()
        total.backward()
        for learner in active:
            learner.finish_step()


@torch.no_grad()
def _look(backbone: Backbone, due: Sequence[Learner]) -> None:
    inputs = [learner.fixed.at(learner.step) for learner in due]
    rows = due[0].method.rows
    prompts = [rows.expand(caption) for each in inputs for caption in each.captions]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_explain_step(backbone))
        for learner in due:
            stack.enter_context(learner.averaged())
        losses = denoising_losses(backbone, [learner.moments for learner in due], inputs, prompts)
        scores = [_clip_score(backbone, each) if each.settings.stop == "clip" else None for each in due]
    parts = losses.split([len(each.captions) for each in inputs])
    for learner, part, score in zip(due, parts, scores, strict=True):
        learner.look(part, score)


def _clip_score(backbone: Backbone, learner: Learner) -> float:
    """Return the mean cosine of eight pictures drawn now with the concept's pictures (CLIP-s, published)."""
    features = _load_features(learner.settings.features, str(backbone.device), backbone.dtype)
    prompts = [learner.concept.templates[number % len(learner.concept.templates)] for number in range(8)]
    prompts = [learner.method.rows.expand(p.replace("{}", learner.concept.token)) for p in prompts]
    drawn = draw_pictures(
        backbone, prompts, [37 + n for n in range(8)], learner.settings.steps, learner.settings.guidance
    )
    own = learner.concept.pictures.permute(0, 2, 3, 1).numpy()
    return float((features.pictures(drawn) @ features.pictures(list(own)).T).mean())


def _is_grid_step(learner: Learner) -> bool:
    """Whether this is the first look at or after 50, 100, 200, 400, … steps."""
    before = learner.curve[-2][0] if len(learner.curve) > 1 else 0
    marks = [50 * 2**power for power in range(20)]
    return any(before < mark <= learner.step for mark in marks)


def grid_prompts(concept: Concept, count: int) -> list[str]:
    """Return the prompts of a grid: two wordings, each with several seeds."""
    wordings = [concept.templates[0], concept.templates[min(1, len(concept.templates) - 1)]]
    return [wordings[number * 2 // count].replace("{}", concept.token) for number in range(count)]


def _draw_grid(backbone: Backbone, learner: Learner) -> None:
    settings = learner.settings
    if settings.grid == 0 or any(grid["step"] == learner.step for grid in learner.grids):
        return
    began = time.perf_counter()
    prompts = grid_prompts(learner.concept, settings.grid)
    seeds = list(range(settings.grid))
    expanded = [learner.method.rows.expand(prompt) for prompt in prompts]
    with learner.averaged():
        pictures = draw_pictures(backbone, expanded, seeds, settings.steps, settings.guidance)
    folder = learner.out / "grids" / f"step_{learner.step:06}"
    with explain_full_disk(learner.out):
        files = write_pictures(folder, pictures)
    learner.grids.append(
        {"step": learner.step, "prompts": prompts, "files": [str(f.relative_to(learner.out)) for f in files]}
    )
    learner.seconds_grids += time.perf_counter() - began


def _finish(backbone: Backbone, learner: Learner) -> dict[str, Any]:
    """Write everything that a finished training leaves."""
    assert learner.stopped is not None
    settings, token = learner.settings, learner.concept.token
    learner.settle()
    metadata = {
        "base_model": settings.model,
        "base_model_hash": learner.identity["model_hash"],
        "steps": str(learner.step),
        "stop_rule": learner.stopped["rule"],
        "stop_reason": learner.stopped["reason"],
        "recipe": json.dumps(learner.identity["settings"], sort_keys=True),
    }
    with explain_full_disk(learner.out):
        files = learner.method.save(token, learner.out, metadata)
    evaluation = _draw_outcome(backbone, learner)
    outcome: dict[str, Any] = {
        "schema": SCHEMA,
        "token": token,
        "vectors": settings.vectors,
        "method": settings.method,
        "model": settings.model,
        "model_hash": learner.identity["model_hash"],
        "pipeline": type(backbone.pipeline).__name__,
        "settings": json.loads(settings.model_dump_json()),
        "steps": learner.step,
        "stop": learner.stopped,
        "curve": learner.curve,
        "bands": [
            [None if isinstance(x, float) and math.isnan(x) else x for x in row] for row in learner.bands
        ],
        "statistic": learner.statistic,
        "train_loss": learner.train_loss,
        "seconds": learner.seconds,
        "seconds_grids": learner.seconds_grids,
        "initial": learner.initial,
        "pictures": [str(path) for path in learner.concept.files],
        "pictures_hash": learner.identity["pictures"],
        "files": files,
        "grids": learner.grids,
        "versions": list_versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "evaluation": evaluation,
    }
    write_outcome(learner.out, outcome)
    return outcome


def _draw_outcome(backbone: Backbone, learner: Learner) -> dict[str, Any] | None:
    """Draw the last grid and evaluate. What cannot be drawn costs nothing of what was learned."""
    assert learner.stopped is not None
    try:
        _draw_grid(backbone, learner)
        return _evaluate(backbone, learner)
    except (TooLarge, Broken) as error:
        if learner.stopped["rule"] != "nan":  # which is told by itself
            warnings.warn(
                f"{learner.concept.token} is trained, but nothing was drawn at its end: {error}; "
                f"`t2iprobe inversion evaluate {learner.out}` draws and evaluates",
                stacklevel=2,
            )
        return None


def write_outcome(out: Path, outcome: dict[str, Any]) -> None:
    """Write training.json and the report, and remove the state that is no longer needed."""
    content = json.dumps(outcome, indent=1, ensure_ascii=False, allow_nan=False).encode()
    with explain_full_disk(out):
        write_atomically(out / "training.json", content)
    _write_page(out)


def _write_page(out: Path) -> None:
    from t2iprobe.inversion.report import write_report

    (out / "state.safetensors").unlink(missing_ok=True)
    write_report(out)


def _evaluate(backbone: Backbone, learner: Learner) -> dict[str, Any] | None:
    """Measure likeness, obedience and diversity, before and after, if the settings ask for it."""
    settings = learner.settings
    if settings.evaluate == 0 or (learner.stopped is not None and learner.stopped["rule"] == "nan"):
        return None
    from t2iprobe.inversion.evaluation import evaluate_learner

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        expanded = [learner.method.rows.expand(prompt) for prompt in prompts]
        return draw_pictures(backbone, expanded, seeds, settings.steps, settings.guidance)

    def draw_before(prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        with learner.untrained():
            return draw(prompts, seeds)

    with explain_lack_of_memory(backbone.device, "the evaluation", "take a larger device"):
        return evaluate_learner(
            draw, draw_before, learner.concept, settings, str(backbone.device), backbone.dtype
        )


def evaluate_outcome(
    backbone: Backbone, concept: Concept, settings: Training, out: Path, outcome: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate a finished training by `settings`, and write its training.json and report again."""
    tokens = {concept.token: settings.vectors}
    method = find_method(settings.method)(backbone, tokens, settings.rank, settings.seed)
    try:
        learner = _make_learner(backbone, concept, out, settings, method, None, {"model_hash": ""})
        method.load(concept.token, out)
        found = {**outcome, "evaluation": _evaluate(backbone, learner)}
    finally:
        method.remove()
    write_outcome(out, found)
    return found


def time_steps(backbone: Backbone, concept: Concept, settings: Training, count: int = 5) -> float:
    """Return the seconds of a training step with its share of the looks, measured on a few thrown away."""
    tokens = {concept.token: settings.vectors}
    method = find_method(settings.method)(backbone, tokens, settings.rank, settings.seed)
    try:
        _check_room(method, concept)
        plain = settings.model_copy(update={"init": "random"})
        learner = _make_learner(backbone, concept, Path("."), plain, method, None, {"model_hash": ""})
        _step(backbone, [learner])  # the first call of a network sets it up
        began = time.perf_counter()
        for _ in range(count):
            _step(backbone, [learner])
        step = (time.perf_counter() - began) / count
        began = time.perf_counter()
        _look(backbone, [learner])
        return step + (time.perf_counter() - began) / learner.stopper.every
    finally:
        method.remove()

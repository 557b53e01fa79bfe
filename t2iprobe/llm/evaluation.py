"""Run tasks of lm-evaluation-harness with the engine: results in its own schema, costs beside the scores."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from t2iprobe.errors import UserError, suggest
from t2iprobe.llm.commands import Engine
from t2iprobe.llm.engine.generation import Trees
from t2iprobe.llm.suites import SUITES, SuiteTask, aggregate, read_metric, score_interval
from t2iprobe.storage import explain_full_disk, remove_leftovers, write_atomically

__all__ = ["TASKS", "Planned", "be_quiet", "evaluate", "plan_suite", "plan_tasks"]

#: Our own tasks, for `lm_eval --include_path` too.
TASKS = Path(__file__).parent / "tasks"
_MERGED = (
    *("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better"),
    *("n-samples",),
)
Show = Callable[[int, int], None]


class Planned:
    """A task to run: its name in the harness, its shots (None: the task's own), its line of a suite."""

    def __init__(self, task: str, shots: int | None = None, line: SuiteTask | None = None) -> None:
        self.task, self.shots, self.line = task, shots, line

    @property
    def name(self) -> str:
        """What its results are kept under."""
        return self.line.name if self.line else self.task


def plan_tasks(names: Sequence[str]) -> list[Planned]:
    """Return the tasks of these names. Raises UserError for one that the harness does not have, nor we."""
    manager = _task_manager(names)
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            known = [task for task in manager.all_tasks if abs(len(task) - len(name)) < 12]
            raise UserError(f"there is no task {name!r}{suggest(name, known)}: `lm_eval ls tasks` lists all")
    if not names:
        raise UserError("name tasks by commas, or give --suite")
    return [Planned(name) for name in names]


def plan_suite(name: str, data: str = "packages") -> tuple[list[Planned], dict[str, str]]:
    """Return the tasks of a suite that have data in packages (or on the hub), and why others are left out."""
    if name not in SUITES:
        raise UserError(f"there is no suite {name!r}{suggest(name, SUITES)}: choose {', '.join(SUITES)}")
    if data not in ("packages", "hub"):
        raise UserError(f"data come from packages or from the hub, not from {data!r}")
    planned, left_out = [], {}
    for line in SUITES[name]:
        task = line.task(data)
        if task is None:
            other = (
                "its data are on the hub: --data hub" if line.hub else line.note or "packages have its data"
            )
            left_out[line.name] = other
        else:
            planned.append(Planned(task, line.shots, line))
    return planned, left_out


def evaluate(
    engine: Engine,
    planned: Sequence[Planned],
    out: Path,
    *,
    limit: int | None = None,
    shots: int | None = None,
    left_out: Mapping[str, str] | None = None,
    trees: Trees | None = None,
    batch: int = 8,
    bootstrap: int = 1000,
    show: Show = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluate tasks one after the other, and write results.json and report.html into `out`.

    Args:
        engine: the model and its draft.
        planned: from `plan_tasks` or `plan_suite`.
        out: a task whose results are there, of the same settings, is not run again.
        limit: documents of each task at most.
        shots: demonstrations; None: the suite's or the task's own.
        left_out: tasks of the suite that cannot be run here, and why.
        trees: how draft trees grow.
        batch: prompts that share each pass of a generation.
        bootstrap: resamples for the standard error of metrics that are no means.
        show: called with tasks done and all.

    Returns results.json: the harness's schema, and `t2iprobe` with each line's value, error and cost,
    `factuality` and `faithfulness`, and what was left out. Raises UserError for data that cannot be had.
    """
    settings = {"model": engine.files.hash, "limit": limit, "shots": shots, "draft": engine.draft_name}
    with explain_full_disk(out):
        _prepare(out, settings)
        parts = []
        for number, task in enumerate(planned):
            path = out / "parts" / f"{task.name.replace('/', '_').replace(' ', '_')}.json"
            part = _read_part(path)
            if part is None:
                show(number, len(planned))
                part = _run(engine, task, limit, shots, trees, batch, bootstrap)
                write_atomically(path, _to_json(part))
            parts.append(part)
        show(len(planned), len(planned))
        results = _merge(parts, planned) | {"left_out": dict(left_out or {}), "settings": settings}
        from t2iprobe.llm.evaluation_page import render

        write_atomically(out / "results.json", _to_json(results))
        write_atomically(out / "report.html", render(results).encode())
    return results


def _run(
    engine: Engine,
    planned: Planned,
    limit: int | None,
    shots: int | None,
    trees: Trees | None,
    batch: int,
    bootstrap: int,
) -> dict[str, Any]:
    """Return one task's results in the harness's schema, and its cost."""
    from lm_eval import simple_evaluate

    from t2iprobe.llm.harness import EngineLM

    model = EngineLM(engine, trees, batch)
    try:
        with be_quiet():
            found = simple_evaluate(
                model=model,
                tasks=[planned.task],
                num_fewshot=planned.shots if shots is None else shots,
                limit=limit,
                task_manager=_task_manager([planned.task]),
                bootstrap_iters=bootstrap,
                log_samples=False,
                confirm_run_unsafe_code=False,
            )
    except ModuleNotFoundError as error:
        raise UserError(
            f"the task {planned.task!r} needs {error.name}: pip install {error.name}, or what provides it"
        ) from None
    except (OSError, ConnectionError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(
            f"the data of the task {planned.task!r} cannot be had here: {text}; download them where there is "
            "a network and copy the folder HF_HOME, or give --suite: its data install from packages"
        ) from None
    assert found is not None
    kept = {key: value for key, value in found.items() if key not in ("samples", "pretty_env_info")}
    return json.loads(json.dumps(kept, default=str)) | {"cost": model.cost.describe()}


def _merge(parts: Sequence[dict[str, Any]], planned: Sequence[Planned]) -> dict[str, Any]:
    """Return the parts' results as one in the harness's schema, with a suite's lines and means."""
    merged = {key: value for key, value in parts[0].items() if key != "cost"}
    for key in _MERGED:
        merged[key] = {name: value for part in parts for name, value in part.get(key, {}).items()}
    lines = []
    for part, task in zip(parts, planned, strict=True):
        own = task.task if task.task in part["results"] else next(iter(part["results"]))
        metrics, documents = part["results"][own], part["n-samples"].get(own, {}).get("effective")
        line: dict[str, Any] = {"name": task.name, "task": task.task, "cost": part["cost"]}
        if task.line is not None:
            value, error = read_metric(metrics, task.line.metric, task.line.scale)
            line |= {
                "kind": task.line.kind,
                "metric": task.line.metric,
                "value": value,
                "stderr": error,
                "interval": score_interval(value, error, documents),
                "note": task.line.note,
            }
        line["shots"] = part["n-shot"].get(own)
        line["documents"] = documents
        line["metrics"] = metrics
        lines.append(line)
    if any(task.line is not None for task in planned):
        merged |= aggregate([line for line in lines if "kind" in line])
    else:
        merged |= {"factuality": None, "faithfulness": None}
    return merged | {"t2iprobe": lines}


# -- the folder ----------------------------------------------------------------------------------------


def _prepare(out: Path, settings: dict[str, Any]) -> None:
    file = out / "settings.json"
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    if file.exists():
        try:
            before = json.loads(file.read_text())
        except ValueError:
            raise UserError(f"{file} is damaged: delete the folder, or write elsewhere") from None
        changed = [key for key in settings if settings[key] != before.get(key)]
        if changed:
            raise UserError(f"{out} holds results of another {changed[0]}: write elsewhere, or delete it")
    for folder in (out, out / "parts"):
        remove_leftovers(folder)
    write_atomically(file, _to_json(settings))


def _read_part(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged: delete it, and run the same command again") from None


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


# -- the harness ---------------------------------------------------------------------------------------


def _task_manager(names: Sequence[str]) -> Any:
    """Return a task manager of ours, and of the harness's own 220 folders where a name is not ours."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("evaluating needs lm-evaluation-harness: pip install 't2iprobe[harness]'") from None
    ours = {path.stem for path in TASKS.glob("*.yaml")}
    with be_quiet():
        return TaskManager(include_path=str(TASKS), include_defaults=not set(names) <= ours)


@contextlib.contextmanager
def be_quiet() -> Iterator[None]:
    """Silence the harness's bars and warnings for a while: progress is told task by task."""
    from tqdm import tqdm

    begin = tqdm.__init__

    def begin_silently(bar: Any, *arguments: Any, **settings: Any) -> None:
        begin(bar, *arguments, **settings | {"disable": True})

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            mock.patch.object(tqdm, "__init__", begin_silently),
            # The harness describes the machine in its results: seconds each time, and not kept here.
            mock.patch("torch.utils.collect_env.get_pretty_env_info", str),
        ):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

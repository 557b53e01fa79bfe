"""The commands of ``t2iprobe hypernymy`` for many runs and other judges: words in, calls out."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from t2iprobe.console import AsJson, duration, print_found

studies = typer.Typer(rich_markup_mode=None)

Settings = Annotated[list[str] | None, typer.Option("--set", help="Any setting, as key=value.")]


@studies.command()
def sweep(
    config: Annotated[
        str | None,
        typer.Argument(help="A preset or a YAML file, with `sweep:` (setting → values) if you like."),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            help="guidance=1,2.5,5, or of steps, scheduler, template, seed, size; several: repeat it."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="embedded, a pipeline folder, a weights file or a hub id.")
    ] = None,
    classifier: Annotated[list[str] | None, typer.Option(help="As in run; several: repeat it.")] = None,
    synsets: Annotated[str | None, typer.Option(help="As in run.")] = None,
    samples: Annotated[int | None, typer.Option(help="Pictures a synset and cell.")] = None,
    keep: Annotated[str | None, typer.Option(help="Pictures to keep: all, thumbnails or none.")] = None,
    settings: Settings = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Allow more samples or synsets than the cells have.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and their cost; write nothing.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the sweep; the same command continues it.")] = Path(
        "runs/sweep"
    ),
    as_json: AsJson = False,
) -> None:
    """Draw the same words at every point of a grid of settings, with the same noise. Can be continued."""
    from t2iprobe.config import load_sweep, parse_settings

    given = {
        "model": model,
        "classifiers": classifier,
        "synsets": synsets,
        "samples": samples,
        "keep": keep,
    }
    chosen = {key: value for key, value in given.items() if value is not None and value != []}
    study, axes = load_sweep(config, chosen | parse_settings(settings or []), over or [])
    if dry_run:
        from t2iprobe.hypernymy.sweep import plan_sweep

        _print_plan(plan_sweep(study, axes, out), as_json)
        return
    _run_sweep(study, axes, out, extend, as_json)


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    cost = "unknown" if plan["predicted_seconds"] is None else duration(plan["predicted_seconds"])
    lines = [
        f"{plan['pictures']} pictures in {len(plan['cells'])} cells, {plan['stored']} of them stored",
        f"time left here: {cost}",
        *(f"  {cell['name']}: {cell['stored']} of {cell['pictures']}" for cell in plan["cells"]),
    ]
    print_found(plan, as_json, "\n".join(lines))


def _run_sweep(study: Any, axes: dict[str, list[Any]], out: Path, extend: bool, as_json: bool) -> None:
    from t2iprobe.progress import progress_bar

    try:
        from t2iprobe.hypernymy.sweep import run_sweep  # heavy: a stop while it loads is a clean one, too

        with progress_bar("pictures") as progress:
            run_sweep(study, axes, out, extend=extend, progress=progress)
    except KeyboardInterrupt:
        print(f"t2iprobe: stopped; what is drawn is in {out}: the same command continues", file=sys.stderr)
        sys.exit(130)
    import json

    results = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    print_found(
        results, as_json, (out / "sweep.md").read_text(encoding="utf-8") + f"\nreport: {out / 'sweep.html'}"
    )

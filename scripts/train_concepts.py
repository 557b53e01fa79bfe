"""Teach a folder of concepts: DIR/<name>/* becomes OUT/<name>/, several concepts in one pass of the denoiser.

    python scripts/train_concepts.py DIR --out OUT [--together 8] [--shard 0/4] [--set key=value …]

Killed, the same command continues: finished concepts are left alone, the others go on from their states.
"""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from t2iprobe.console import AsJson, duration, print_found
from t2iprobe.errors import UserError


def main(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A subfolder of pictures for each concept.")],
    out: Annotated[Path, typer.Option(help="OUT/<name>/ is what `t2iprobe inversion train` writes.")],
    model: Annotated[
        str | None, typer.Option(help="embedded, a pipeline folder, a weights file or a hub id.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="textual-inversion, dreambooth-lora or custom-diffusion.")
    ] = None,
    stop: Annotated[str | None, typer.Option(help="plateau, dvar, clip or budget.")] = None,
    together: Annotated[int | None, typer.Option(help="Concepts in one pass (textual inversion).")] = None,
    shard: Annotated[str, typer.Option(help="i/n: every n-th concept, for n machines.")] = "0/1",
    seed: Annotated[int | None, typer.Option(help="Of everything.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting, as key=value.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without pictures that cannot be read.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Teach a folder of concepts, several in one pass."""
    given = {"model": model, "method": method, "stop": stop, "seed": seed, "together": together}
    try:
        from t2iprobe.inversion.commands import load_training, train_folders
        from t2iprobe.progress import progress_bar

        with progress_bar("steps") as progress:
            outcomes = train_folders(
                folder, load_training(given, settings), out, shard=shard, skip_bad=skip_bad, progress=progress
            )
    except KeyboardInterrupt:
        print("train_concepts: stopped: the same command continues", file=sys.stderr)
        sys.exit(130)
    lines = [
        f"{name:24} {found['steps']:5} steps  {duration(found['seconds'])}  {found['stop']['reason']}"
        for name, found in outcomes.items()
    ]
    print_found(outcomes, as_json, "\n".join(lines))


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        typer.run(main)
    except UserError as error:
        print(f"train_concepts: {error}", file=sys.stderr)
        sys.exit(2)

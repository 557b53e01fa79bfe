"""Teach a folder of concepts: DIR/<name>/* becomes OUT/<name>/, several concepts in one pass of the denoiser.

    python scripts/train_concepts.py DIR --out OUT [--together 8] [--shard 0/4] [--set key=value …]
    accelerate launch --num_processes 4 scripts/train_concepts.py DIR --out OUT
    python scripts/train_concepts.py DIR --out OUT --cluster ray://HOST:10001

Killed, the same command continues: finished concepts are left alone, the others go on from their states.
"""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from t2iprobe.cluster import Cluster, costs_display, describe_costs
from t2iprobe.console import AsJson, duration, print_found
from t2iprobe.errors import UserError
from t2iprobe.launch import join_launch, may_tell


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
    cluster: Annotated[
        str | None, typer.Option(help="Train on a Ray cluster: local, or ray://HOST:PORT.")
    ] = None,
    worker_cores: Annotated[
        int | None, typer.Option(min=1, help="CPU cores of a worker without a GPU (4, where there are).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting, as key=value.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without pictures that cannot be read.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Teach a folder of concepts, several in one pass."""
    given = {"model": model, "method": method, "stop": stop, "seed": seed, "together": together}
    launch = join_launch()
    if sum((shard != "0/1", cluster is not None, launch is not None)) > 1:
        raise UserError("--shard, --cluster and a launch of several processes each share the work: take one")
    costs = None
    try:
        from t2iprobe.inversion.commands import load_training, train_folders
        from t2iprobe.progress import progress_bar

        training = load_training(given, settings)
        if cluster is not None:
            from t2iprobe.inversion.cluster import train_on_cluster

            with costs_display("concepts") as show:
                outcomes, costs = train_on_cluster(
                    folder, training, out, Cluster(cluster, worker_cores), skip_bad=skip_bad, show=show
                )
        else:
            with progress_bar("steps") as progress:
                if launch is None:
                    outcomes = train_folders(
                        folder, training, out, shard=shard, skip_bad=skip_bad, progress=progress
                    )
                else:
                    from t2iprobe.inversion.cluster import train_launched

                    shown = progress if launch.first else None
                    outcomes = train_launched(
                        folder, training, out, launch, skip_bad=skip_bad, progress=shown
                    )
    except KeyboardInterrupt:
        if may_tell():
            print("train_concepts: stopped: the same command continues", file=sys.stderr)
        sys.exit(130)
    if launch is not None and not launch.first:
        return
    lines = [
        f"{name:24} {found['steps']:5} steps  {duration(found['seconds'])}  {found['stop']['reason']}"
        for name, found in outcomes.items()
    ]
    lines += describe_costs(costs, "concepts") if costs else []
    print_found(outcomes, as_json, "\n".join(lines))


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        typer.run(main)
    except UserError as error:
        if may_tell():
            print(f"train_concepts: {error}", file=sys.stderr)
        sys.exit(2)

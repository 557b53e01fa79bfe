"""The commands of ``t2iprobe inversion``: words in, calls out."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from t2iprobe.console import AsJson, duration, print_found

inversion = typer.Typer(
    help="Teach the model a word from a few pictures, and stop when nothing more is learned.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Model = Annotated[str | None, typer.Option(help="embedded, a pipeline folder, a weights file or a hub id.")]
Method = Annotated[str | None, typer.Option(help="textual-inversion, dreambooth-lora or custom-diffusion.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any setting, as key=value.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on without pictures that cannot be read.")]


@inversion.command()
def train(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A few pictures of one thing or style.")],
    token: Annotated[str, typer.Option(help='What will stand for it in prompts: "<name>".')],
    model: Model = None,
    method: Method = None,
    stop: Annotated[str | None, typer.Option(help="plateau, dvar, clip or budget.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps at most.")] = None,
    every: Annotated[int | None, typer.Option(help="Steps between two looks at the watched loss.")] = None,
    fixed: Annotated[
        str | None,
        typer.Option(help="Which of images, latents, noise, captions, timesteps it keeps: 11111."),
    ] = None,
    init: Annotated[str | None, typer.Option(help="nearest, random, or words by commas.")] = None,
    vectors: Annotated[int | None, typer.Option(help="Rows of the concept.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="object, style, or a caption with {}; several: repeat it.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures a step.")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate of the method's weights.")] = None,
    row_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the rows, in units of the vocabulary's size.")
    ] = None,
    prior: Annotated[
        str | None, typer.Option(help="A word whose pictures, drawn by the model, hold the rest in place.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = None,
    skip_bad: SkipBad = False,
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its cost; write nothing.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write; the same command continues it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Teach the model one word. Can be stopped and continued."""
    given = {
        "model": model,
        "method": method,
        "stop": stop,
        "max_steps": max_steps,
        "every": every,
        "fixed": fixed,
        "init": init,
        "vectors": vectors,
        "templates": template if template is None or len(template) > 1 else template[0],
        "batch": batch,
        "rate": rate,
        "row_rate": row_rate,
        "prior": prior,
        "size": size,
        "seed": seed,
        "dtype": dtype,
        "device": device,
    }
    out = out or Path("runs") / token.strip("<>")
    try:
        from t2iprobe.inversion.commands import load_training, plan_training, train_folder
        from t2iprobe.progress import progress_bar

        chosen = load_training(given, settings)
        if dry_run:
            plan = plan_training(folder, token, chosen, skip_bad=skip_bad)
            print_found(plan, as_json, _describe_plan(plan))
            return
        before = "done before: " if (out / "training.json").exists() else ""
        with progress_bar("steps") as progress:
            outcome = train_folder(folder, token, chosen, out, skip_bad=skip_bad, progress=progress)
    except KeyboardInterrupt:
        print(f"t2iprobe: stopped: the same command continues from the state in {out}", file=sys.stderr)
        sys.exit(130)
    print_found(outcome, as_json, before + describe_outcome(outcome, out))


def describe_outcome(outcome: dict[str, Any], out: Path) -> str:
    """Return what people want to know of a finished training."""
    stop = outcome["stop"]
    lines = [
        f"{outcome['token']:24} {outcome['steps']} steps in {duration(outcome['seconds'])}",
        f"{'stopped by ' + stop['rule']:24} {stop['reason']}",
        f"{'files':24} {', '.join(str(out / name) for name in outcome['files'])}",
        f"{'report':24} {out / 'report.html'}",
    ]
    for name, measured in reversed((outcome["evaluation"] or {}).items()):
        if isinstance(measured, dict) and measured.get("value") is not None and measured.get("before"):
            lines.insert(2, f"{name:24} {measured['value']:.3f} (before: {measured['before']['value']:.3f})")
    return "\n".join(lines)


def _describe_plan(plan: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"{plan['pictures']} pictures, {plan['method']} on {plan['model']}",
            f"{plan['seconds_per_step']:.3f} s a step",
            f"at most {plan['max_steps']} steps, {duration(plan['seconds'])}: most stop much earlier",
        ]
    )


@inversion.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="What train wrote.")],
    pictures: Annotated[int, typer.Option(help="Pictures a prompt.")] = 16,
    features: Annotated[
        str | None, typer.Option(help="Who compares: auto, classifier, clip:NAME:FILE.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure likeness, obedience and diversity, before and after, and write the report again."""
    try:
        from t2iprobe.inversion.commands import evaluate_folder

        outcome = evaluate_folder(folder, pictures, features)
    except KeyboardInterrupt:
        print(f"t2iprobe: stopped: {folder} is as it was", file=sys.stderr)
        sys.exit(130)
    print_found(outcome["evaluation"], as_json, describe_outcome(outcome, folder))


@inversion.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An embedding, or a LoRA for kohya.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    to: Annotated[str, typer.Option(help="diffusers, a1111, a1111-pt, sdxl or kohya.")],
    token: Annotated[str | None, typer.Option(help="Where the file does not say its token.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rewrite an embedding for another program."""
    from t2iprobe.inversion.formats import convert as convert_file

    written = [str(path) for path in convert_file(source, target, to, token)]
    print_found({"files": written}, as_json, f"wrote {', '.join(written)}")


@inversion.command()
def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An embedding, LoRA or Custom Diffusion file.")
    ],
    as_json: AsJson = False,
) -> None:
    """Tell what a file holds: its form, token, vectors, and the models that it fits."""
    from t2iprobe.console import plain
    from t2iprobe.inversion.formats import inspect as inspect_file

    found = inspect_file(file)
    print_found(found, as_json, "\n".join(f"{key:12} {plain(value)}" for key, value in found.items()))


@inversion.command()
def teach(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A probe's run directory.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORD]…", help="Synsets or lemmas; unknown ones by default."),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(help="DIR/<word>/* (or DIR/* for one word); the packaged concepts by default."),
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="As in train, or all; several: repeat it.")] = None,
    samples: Annotated[int, typer.Option(help="Pictures a word, before and after.")] = 16,
    settings: Settings = None,
    skip_bad: SkipBad = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write; the same command continues it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Teach the model words that a probe found unknown, and probe them again with the same seeds."""
    if out is None:
        run = run.resolve()  # it may be "."
        out = run.with_name(f"{run.name}-taught")
    try:
        from t2iprobe.inversion.commands import load_training
        from t2iprobe.inversion.teaching import teach as teach_words
        from t2iprobe.progress import progress_bar

        chosen = load_training({}, settings)
        with progress_bar("words") as progress:
            found = teach_words(
                run, words or [], pictures, out, methods=method or [], samples=samples, settings=chosen,
                skip_bad=skip_bad, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        print(f"t2iprobe: stopped: the same command continues what is in {out}", file=sys.stderr)
        sys.exit(130)
    print_found(found, as_json, _describe_teaching(found, out))


def _describe_teaching(found: dict[str, Any], out: Path) -> str:
    lines = [f"{'word':24} {'method':18} {'before':>7} {'after':>7}  difference, 95 % interval    q"]
    for row in found["words"]:
        difference = row["difference"]
        low, high = difference["interval"] or (float("nan"), float("nan"))
        q = "–" if difference["q"] is None else f"{difference['q']:.3f}"
        lines.append(
            f"{row['word'][:24]:24} {row['method']:18} {row['before']['value']:7.4f} "
            f"{row['after']['value']:7.4f}  "
            f"{difference['value']:+.4f} [{low:+.4f}, {high:+.4f}]  {q}"
            f"{'  *' if row['significant'] else ''}"
        )
    return "\n".join([*lines, f"report: {out / 'report.html'}"])

"""The commands of ``t2iprobe hypernymy`` for many runs and other judges: words in, calls out."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from t2iprobe.console import AsJson, duration, print_found
from t2iprobe.errors import UserError

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
    shard: Annotated[str, typer.Option(help="i/n, as in run: a share of every cell.")] = "0/1",
    cluster: Annotated[str | None, typer.Option(help="As in run: local, or ray://HOST:PORT.")] = None,
    worker_cores: Annotated[
        int | None, typer.Option(min=1, help="CPU cores of a worker without a GPU (4, where there are).")
    ] = None,
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
    from t2iprobe.config import load_sweep, parse_settings, read_share
    from t2iprobe.launch import join_launch

    launch, share = join_launch(), read_share(shard)
    if (share != (0, 1)) + (cluster is not None) + (launch is not None) > 1:
        raise UserError("--shard, --cluster and a launch of several processes each share the sweep: take one")
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
        from t2iprobe.cluster import Cluster
        from t2iprobe.hypernymy.planning import plan_sweep
        from t2iprobe.launch import seconds_since_start

        where = Cluster(cluster, worker_cores) if cluster is not None else None
        seconds = seconds_since_start()
        plan = plan_sweep(
            study, axes, out, share=share, launch=launch, cluster=where, process_seconds=seconds
        )
        if launch is None or launch.first:
            _print_plan(plan, as_json)
        return
    runs, costs = _run_sweep(study, axes, out, launch, share, cluster, worker_cores, extend)
    if launch is None or launch.first:
        _print_sweep(out, runs, costs, as_json)


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    from t2iprobe.hypernymy.planning import describe_cost

    lines = [
        f"{plan['pictures']} pictures in {len(plan['cells'])} cells, {plan['stored']} of them stored",
        describe_cost(plan),
        *(f"  {cell['name']}: {cell['stored']} of {cell['pictures']}" for cell in plan["cells"]),
    ]
    print_found(plan, as_json, "\n".join(lines))


def _run_sweep(
    study: Any,
    axes: dict[str, list[Any]],
    out: Path,
    launch: Any,
    share: tuple[int, int],
    cluster: str | None,
    cores: int | None,
    extend: bool,
) -> tuple[list[Any], dict[str, Any] | None]:
    from t2iprobe.cluster import Cluster, costs_display
    from t2iprobe.launch import may_tell
    from t2iprobe.progress import progress_bar

    try:  # the imports are heavy: a stop while they load is a clean one, too
        if cluster is not None:
            from t2iprobe.hypernymy.cluster import sweep_on_cluster

            with costs_display("pictures") as show:
                where = Cluster(cluster, cores)
                return sweep_on_cluster(study, axes, out, where, extend=extend, show=show)
        from t2iprobe.hypernymy.sweep import run_sweep

        with progress_bar("pictures") as bar:
            progress = bar if launch is None or launch.first else None
            more = {"share": share, "launch": launch, "extend": extend, "progress": progress}
            return run_sweep(study, axes, out, **more), None
    except KeyboardInterrupt:
        if may_tell():
            text = f"stopped; what is drawn is in {out}: the same command continues"
            print(f"t2iprobe: {text}", file=sys.stderr)
        sys.exit(130)


def _print_sweep(out: Path, runs: list[Any], costs: dict[str, Any] | None, as_json: bool) -> None:
    import json

    from t2iprobe.cluster import describe_costs

    if left := sum(len(run.missing()) for run in runs):
        text = f"this share is done; {left} pictures are left to other shares"
        print_found({"sweep": str(out), "missing": left}, as_json, text)
        return
    results = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    lines = [(out / "sweep.md").read_text(encoding="utf-8")]
    if costs is not None:
        results |= {"cluster": costs}
        lines += describe_costs(costs, "pictures")
    print_found(results, as_json, "\n".join([*lines, f"report: {out / 'sweep.html'}"]))


@studies.command()
def leaderboard(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Run directories, or results.json files of runs.")
    ],
    out: Annotated[Path, typer.Option(help="HTML file; .csv, .md and .json go beside it.")] = Path(
        "leaderboard.html"
    ),
    as_json: AsJson = False,
) -> None:
    """Rank many runs, with the uncertainty of ranks; what does not compare is marked."""
    from t2iprobe.hypernymy.leaderboard import write_leaderboard, write_markdown

    found, page = write_leaderboard(runs, out)
    print_found(found, as_json, f"{write_markdown(found)}\nwrote {page}")


@studies.command()
def frequency(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run directory.")],
    captions: Annotated[
        list[Path],
        typer.Argument(metavar="CAPTIONS…", help="txt, jsonl, json (COCO), csv, tsv, parquet; gz."),
    ],
    column: Annotated[
        str | None, typer.Option(help="Of captions, in tables: caption or text by default.")
    ] = None,
    lemmas: Annotated[str, typer.Option(help="Of a synset: first, as published, or all.")] = "first",
    out: Annotated[
        Path | None, typer.Option(help="JSON file, .csv beside it; frequency.json in the run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell whether the model knows best what captions name most often. Files are counted once."""
    from t2iprobe.hypernymy.frequency import write_frequency
    from t2iprobe.pages import format_interval, format_score
    from t2iprobe.progress import progress_bar
    from t2iprobe.runs import Run

    with progress_bar("files") as progress:
        found = write_frequency(Run.open(run), captions, out, column=column, lemmas=lemmas, progress=progress)
    lines = [f"{found['captions']} captions; {found['never_named']} synsets are named in none"]
    for part, label in (("correlation", "all synsets"), ("single_word", "lemmas of one word")):
        for metric, ranks in found[part].items():
            lines.append(
                f"{metric.upper()}, {label}: Spearman {format_score(ranks['spearman'], 3)} "
                f"({format_interval(ranks['spearman_interval'], 3)}), N = {ranks['n']}"
            )
    print_found(found, as_json, "\n".join(lines))


@studies.command()
def human(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE…", help="CSV or TSV: task, worker, answer (a, b, none), swapped (0, 1)."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Analyse what people preferred of pairs: shares, and their agreement, with intervals."""
    from t2iprobe.hypernymy.human import analyse_answers, write_lines

    found = [analyse_answers(path) for path in files]
    print_found(found, as_json, "\n".join(write_lines(found)))


@studies.command("judge")
def judge_command(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run that kept pictures, or DIR/<synset>/* of any synsets."),
    ],
    judge: Annotated[
        str, typer.Option(help="clip, clip:NAME:TAG, clip:NAME:FILE, or clip:FOLDER (transformers).")
    ] = "clip",
    text: Annotated[
        str, typer.Option(help="What CLIP reads of a synset, with fields as in run.")
    ] = "{lemma}",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON file, .csv beside it; judges/ in the run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a run's pictures by CLIP: like the word, its kind, its siblings? No ImageNet classes needed."""
    from t2iprobe.hypernymy.clip_judge import MEASURES, judge_pictures
    from t2iprobe.pages import format_interval, format_score
    from t2iprobe.progress import progress_bar

    with progress_bar("synsets") as progress:
        found = judge_pictures(source, judge, out, text=text, device=device, progress=progress)
    lines = [f"{len(found['synsets'])} synsets by {found['judge']}"]
    for measure in MEASURES:
        mean = found["means"][measure]
        lines.append(f"{measure:12} {format_score(mean['value'])}  ({format_interval(mean['interval'])})")
    for row in found["agreement"]:
        lines.append(
            f"{row['measure']} and ISP by {row['classifier']}: Spearman {format_score(row['spearman'], 3)}"
        )
    print_found(found, as_json, "\n".join(lines))


@studies.command()
def coco(
    captions: Annotated[
        Path, typer.Argument(metavar="CAPTIONS", help="COCO's JSON, or txt, jsonl, csv, tsv, parquet.")
    ],
    config: Annotated[str | None, typer.Option(help="A preset or a YAML file, as in run.")] = None,
    model: Annotated[str | None, typer.Option(help="As in run.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Captions, drawn with seed 0 from more.")] = 10_000,
    column: Annotated[str | None, typer.Option(help="Of captions, in tables.")] = None,
    real: Annotated[Path | None, typer.Option(help="Folder of real pictures, for FID.")] = None,
    clip: Annotated[
        str | None, typer.Option(help="Folder or hub id of a transformers CLIP, for CLIPScore.")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(help="torch-fidelity's Inception weights, where there is no network.")
    ] = None,
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its cost; write nothing.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder; the same command continues it.")] = Path("runs/coco"),
    as_json: AsJson = False,
) -> None:
    """Draw a picture of each caption and score them: FID against real pictures, CLIPScore."""
    from t2iprobe.config import load_study, parse_settings
    from t2iprobe.hypernymy.coco import choose_captions, plan_coco, run_coco
    from t2iprobe.pages import format_interval, format_score
    from t2iprobe.progress import progress_bar

    study = load_study(config, ({"model": model} if model else {}) | parse_settings(settings or []))
    chosen = choose_captions(captions, count, column)
    if dry_run:
        plan = plan_coco(study, chosen, out)
        cost = "unknown" if plan["predicted_seconds"] is None else duration(plan["predicted_seconds"])
        text = f"{plan['pictures']} pictures, {plan['stored']} of them stored\ntime left here: {cost}"
        print_found(plan, as_json, text)
        return
    try:
        with progress_bar("pictures") as progress:
            found = run_coco(study, chosen, out, real=real, clip=clip, inception=inception, progress=progress)
    except KeyboardInterrupt:
        print(f"t2iprobe: stopped; what is drawn is in {out}: the same command continues", file=sys.stderr)
        sys.exit(130)
    lines = [f"{found['pictures']} pictures in {out / 'pictures'}"]
    if fid := found.get("fid"):
        lines.append(f"FID        {fid['value']:.2f}  ({fid['drawn']} drawn, {fid['real']} real)")
    if score := found.get("clip_score"):
        lines.append(f"CLIPScore  {format_score(score['value'])}  ({format_interval(score['interval'])})")
    print_found(found, as_json, "\n".join(lines))

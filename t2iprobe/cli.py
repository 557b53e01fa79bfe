"""The command line: words in, calls out. Everything heavy is imported inside the command that needs it."""

import atexit
import gc
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import t2iprobe
from t2iprobe.cli_inversion import inversion
from t2iprobe.cli_prompts import llm
from t2iprobe.cli_studies import studies
from t2iprobe.console import AsJson, duration, plain, print_found, to_json
from t2iprobe.errors import UserError
from t2iprobe.launch import join_launch, may_tell

if TYPE_CHECKING:
    from t2iprobe.config import Study
    from t2iprobe.launch import Launch
    from t2iprobe.runs import Run

app = typer.Typer(
    help="What does a text-to-image model understand? Probe it with WordNet, with error bars.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
hypernymy = typer.Typer(
    help="Does the model know what is a kind of what? In-subtree probability and subtree coverage.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
hypernymy.add_typer(studies)
app.add_typer(hypernymy, name="hypernymy")
app.add_typer(inversion, name="inversion")
app.add_typer(llm, name="llm")

Out = Annotated[Path | None, typer.Option("--out", help="Where to write.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


def main() -> NoReturn:
    """Run the command line. Exit code 0: done, 2: a mistake in the input, 130: stopped, 1: our bug."""
    signal.signal(signal.SIGTERM, _stop)  # clusters stop a job by SIGTERM
    atexit.register(gc.freeze)  # or Python looks for cycles in all of torch, seconds long, before it ends
    try:
        app()
    except UserError as error:
        if may_tell():
            print(f"t2iprobe: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """What does a text-to-image model understand? Probe it with WordNet, with error bars."""
    if version:
        print(t2iprobe.__version__)
        raise typer.Exit


@hypernymy.command()
def run(
    config: Annotated[
        str | None, typer.Argument(help="A preset (tiny, embedded, paper, sd15, …) or a YAML file.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="embedded, a pipeline folder, a weights file or a hub id.")
    ] = None,
    classifier: Annotated[
        list[str] | None,
        typer.Option(
            help="embedded, efficientnet-lite1, timm:NAME[@FILE] or torchvision:NAME; several: repeat it."
        ),
    ] = None,
    synsets: Annotated[
        str | None,
        typer.Option(help="nonleaf, leaves, all, subtree:NAME, names, wnids, lemmas or files, by commas."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Pictures a synset and template; with --until at most.")
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(help='Draw where it tells most, until "isp ± 0.005", "isp - RUN ± 0.005" or "unknown".'),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all pictures.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of guidance.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="A diffusers scheduler, such as DDIMScheduler.")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help="A published template's name, or a text with {lemma}; several: repeat it."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of prompts, rows synset and prompt.")] = None,
    language: Annotated[
        str | None, typer.Option(help="Ask in these, too, by commas, with the same noise: fr, de, es.")
    ] = None,
    words: Annotated[int | None, typer.Option(help="Words of a synset in each language.")] = None,
    hierarchy: Annotated[
        Path | None, typer.Option(help="CSV of wnids of a classifier with other labels.")
    ] = None,
    batch_size: Annotated[str | None, typer.Option(help="Pictures drawn at once, or auto.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile", help="Compile the denoiser first: pays on long runs.")
    ] = None,
    keep: Annotated[str | None, typer.Option(help="Pictures to keep: all, thumbnails or none.")] = None,
    shard: Annotated[str, typer.Option(help="i/n: draw one of n shares of the run, 0/n to n-1/n.")] = "0/1",
    cluster: Annotated[
        str | None, typer.Option(help="Draw on a Ray cluster: local, or ray://HOST:PORT.")
    ] = None,
    worker_cores: Annotated[
        int | None, typer.Option(min=1, help="CPU cores of a worker without a GPU (4, where there are).")
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Allow more samples or synsets than the run has.")
    ] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting, as key=value.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its cost; write nothing.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Run directory; the same command continues it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw synsets, judge the pictures, report what the model understands. Can be stopped and continued."""
    from t2iprobe.config import read_share

    launch = join_launch()
    given = {
        "model": model,
        "classifiers": classifier,
        "synsets": synsets,
        "samples": samples,
        "until": until,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "size": size,
        "scheduler": scheduler,
        "templates": template,
        "prompts": prompts,
        "languages": language,
        "words": words,
        "hierarchy": hierarchy,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": device,
        "compile": compiled,
        "keep": keep,
    }
    study = _load_study(config, given, settings)
    share = read_share(shard)
    if (share != (0, 1)) + (cluster is not None) + (launch is not None) > 1:
        raise UserError("--shard, --cluster and a launch of several processes each share the run: take one")
    if dry_run:
        _print_plan(study, out, share, launch, cluster, worker_cores, as_json)
        return
    out = _default_out(out, study.model)
    if launch is not None or cluster is not None:
        _run_on_many(study, out, launch, cluster, worker_cores, extend=extend, as_json=as_json)
        return
    _run_study(study, out, share=share, extend=extend, as_json=as_json)


@hypernymy.command()
def pictures(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="DIR/<synset>/*, by synset name, wnid or lemma.")
    ],
    classifier: Annotated[list[str] | None, typer.Option(help="As in run; several: repeat it.")] = None,
    hierarchy: Annotated[
        Path | None, typer.Option(help="CSV of wnids of a classifier with other labels.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Pictures to keep in the run: all, thumbnails or none.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without pictures that cannot be read.")
    ] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting, as key=value.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; the same command continues it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Judge pictures that were made elsewhere, so that any model can be probed."""
    given = {"model": "folder", "classifiers": classifier, "hierarchy": hierarchy, "keep": keep}
    study = _load_study(None, given, settings)
    _run_study(study, _default_out(out, str(folder)), folder=folder, skip_bad=skip_bad, as_json=as_json)


@hypernymy.command()
def score(
    logits: Annotated[Path, typer.Argument(metavar="LOGITS.npz", help="synset → float32 [N, 1000].")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    hierarchy: Annotated[
        Path | None, typer.Option(help="CSV of wnids, for other labels than ImageNet-1k.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute the metrics of logits made elsewhere (the published npz layout)."""
    from t2iprobe.hypernymy.hierarchy import Hierarchy
    from t2iprobe.hypernymy.results import score_file
    from t2iprobe.storage import write_output

    results = score_file(logits, Hierarchy.from_csv(hierarchy) if hierarchy else None)
    if out is not None:
        write_output(out, to_json(results).encode())
    _print_results(results, as_json, f"wrote {out}" if out else None)


@hypernymy.command()
def report(folder: RunFolder, as_json: AsJson = False) -> None:
    """Write the report of a run again, from its logits (of a part of it, too)."""
    from t2iprobe.hypernymy.report import write_report
    from t2iprobe.runs import Run

    path = write_report(Run.open(folder))
    print_found({"report": str(path)}, as_json, f"wrote {path}")


@hypernymy.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("comparison.html"),
    as_json: AsJson = False,
) -> None:
    """Compare two runs: paired tests, and what each model knows that the other does not."""
    from t2iprobe.hypernymy.report import write_comparison
    from t2iprobe.runs import Run

    path = write_comparison(Run.open(run_a), Run.open(run_b), out)
    print_found({"comparison": str(path)}, as_json, f"wrote {path}")


@hypernymy.command()
def templates(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN…", help="Runs of several templates (preset: templates)."),
    ],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; templates.html in the run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell how far ISP and SCS move with the template, what ensembles gain, and whether ranks agree."""
    from t2iprobe.hypernymy.templates import write_template_report
    from t2iprobe.runs import Run

    path = out or folders[0] / "templates.html"
    found = write_template_report([Run.open(folder) for folder in folders], path)
    lines = [
        f"{run['run']}: {name} {spread['mean']:.4f}, by template {spread['min']:.4f} to {spread['max']:.4f}"
        for run in found["runs"]
        for name, spread in run["spread"].items()
    ]
    print_found(found, as_json, "\n".join([*lines, f"wrote {path}"]))


@hypernymy.command()
def unknown(folder: RunFolder, as_json: AsJson = False) -> None:
    """List the synsets that the model does not draw better than chance."""
    from t2iprobe.hypernymy.results import read_results
    from t2iprobe.runs import Run

    results = read_results(Run.open(folder))
    rows = [row for row in results["synsets"] if not row["known"]]
    lines = [
        f"{row['synset']:32} isp {row['isp']:.4f}  chance {row['floor']:.4f}  p {row['p']:.3f}"
        for row in rows
    ]
    summary = f"{len(rows)} of {len(results['synsets'])} synsets are not above chance"
    print_found({"unknown": rows, "of": len(results["synsets"])}, as_json, "\n".join([*lines, summary]))


@hypernymy.command()
def verify(
    folder: RunFolder,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set damaged shards aside, to be drawn again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every stored shard and picture of a run. Exit code 2 where something is damaged."""
    from t2iprobe.hypernymy.adaptive import find_missing
    from t2iprobe.runs import Run

    checked = Run.open(folder)
    problems = checked.verify(repair=repair)
    missing = len(find_missing(checked)) if repair or not problems else None
    found = {
        "problems": problems,
        "repaired": repair and bool(problems),
        "missing": missing,
        "of": len(checked.plan),
    }
    lines = problems or ["everything that is stored is whole"]
    if missing:
        lines = [
            *lines,
            f"{missing} of {len(checked.plan)} pictures are missing: the run's command draws them",
        ]
    print_found(found, as_json, "\n".join(lines))
    if problems and not repair:
        raise UserError(f"{len(problems)} problems in {folder}: add --repair to set the damaged shards aside")


@hypernymy.command()
def export(
    folder: RunFolder,
    form: Annotated[
        str, typer.Option("--format", help="csv, markdown, or npz (the published layout of logits).")
    ] = "csv",
    classifier: Annotated[str | None, typer.Option(help="Of npz; the first by default.")] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's synsets as CSV, its leaderboard row as Markdown, or its logits as npz."""
    from t2iprobe.hypernymy.results import export_run
    from t2iprobe.runs import Run

    path = export_run(Run.open(folder), form, out, classifier)
    print_found({"file": str(path)}, as_json, f"wrote {path}")


@app.command()
def info(as_json: AsJson = False) -> None:
    """Tell what this machine can do: devices, versions, what came with the package."""
    from t2iprobe.machine import describe_machine

    found = describe_machine()
    print_found(found, as_json, "\n".join(f"{key:12} {plain(value)}" for key, value in found.items()))


def _load_study(config: str | None, given: dict[str, Any], settings: list[str] | None) -> "Study":
    from t2iprobe.config import load_study, parse_settings

    chosen = {key: value for key, value in given.items() if value is not None and value != []}
    return load_study(config, chosen | parse_settings(settings or []))


def _default_out(out: Path | None, name: str) -> Path:
    name = Path(name).resolve().name if Path(name).is_dir() else Path(name).name
    return out or Path("runs") / name.partition("@")[0]


def _run_study(study: "Study", out: Path, *, as_json: bool, **more: Any) -> None:
    from t2iprobe.hypernymy.adaptive import is_complete
    from t2iprobe.hypernymy.results import read_results
    from t2iprobe.runs import Run

    try:
        from t2iprobe.hypernymy.study import run_study  # heavy: a stop while it loads is a clean one, too

        with _progress_bar() as progress:
            finished = run_study(study, out, progress=progress, **more)
    except KeyboardInterrupt:
        print(f"t2iprobe: stopped: {_count(Run, out)}; the same command continues", file=sys.stderr)
        sys.exit(130)
    if is_complete(finished):
        last = f"report: {finished.path / 'report.html'}"
        _print_results(read_results(finished), as_json, last, _describe_languages(finished))
    else:
        left = len(finished.missing())
        text = f"this share is done; {left} of {len(finished.plan)} pictures are left to other shares"
        print_found({"run": str(out), "missing": left}, as_json, text)


def _run_on_many(
    study: "Study",
    out: Path,
    launch: "Launch | None",
    cluster: str | None,
    cores: int | None,
    *,
    extend: bool,
    as_json: bool,
) -> None:
    from t2iprobe.cluster import Cluster, costs_display, describe_costs
    from t2iprobe.hypernymy.results import read_results
    from t2iprobe.runs import Run

    costs = None
    try:
        from t2iprobe.hypernymy.cluster import run_launched, run_on_cluster

        if launch is None:
            assert cluster is not None
            with costs_display("pictures") as show:
                finished, costs = run_on_cluster(
                    study, out, Cluster(cluster, cores), extend=extend, show=show
                )
        else:
            with _progress_bar() as progress:
                finished = run_launched(
                    study, out, launch, extend=extend, progress=progress if launch.first else None
                )
    except KeyboardInterrupt:
        if may_tell():
            how = "" if launch is None else ", with any number of processes"
            why = "" if launch is None else " with a process of its launch"
            print(
                f"t2iprobe: stopped{why}: {_count(Run, out)}; the same command continues{how}",
                file=sys.stderr,
            )
        sys.exit(130)
    if launch is None or launch.first:
        results, last = read_results(finished), f"report: {finished.path / 'report.html'}"
        more = describe_costs(costs, "pictures") if costs else []
        results |= {"cluster": costs} if costs else {}
        _print_results(results, as_json, last, [*_describe_languages(finished), *more])


def _count(run_class: type["Run"], out: Path) -> str:
    if not (out / "manifest.json").exists():
        return "nothing is stored yet"
    stopped = run_class.open(out)
    return f"{len(stopped.done())} of {len(stopped.plan)} pictures are stored in {out}"


def _progress_bar() -> Any:
    from t2iprobe.progress import progress_bar

    return progress_bar("pictures")


def _print_plan(
    study: "Study",
    out: Path | None,
    share: tuple[int, int],
    launch: "Launch | None",
    cluster: str | None,
    cores: int | None,
    as_json: bool,
) -> None:
    from t2iprobe.cluster import Cluster
    from t2iprobe.hypernymy.adaptive import describe_rule
    from t2iprobe.hypernymy.planning import describe_cost, plan_study
    from t2iprobe.launch import seconds_since_start

    where = Cluster(cluster, cores) if cluster is not None else None
    plan = plan_study(
        study, out, share=share, launch=launch, cluster=where, process_seconds=seconds_since_start()
    )
    if launch is not None and not launch.first:
        return
    first = plan.get("until", {}).get("seconds_first")
    lines = [
        f"{plan['pictures']} pictures of {plan['synsets']} synsets, {plan['stored']} of them stored",
        f"first prompt: {plan['first_prompt']}",
        *([describe_rule(plan["until"])] if "until" in plan else []),
        *([f"time to its first look: {duration(first)}"] if first is not None else []),
        describe_cost(plan),
        *(f"  {key}: {plain(value)}" for key, value in plan["configuration"].items() if value is not None),
    ]
    print_found(plan, as_json, "\n".join(lines))


def _describe_languages(run: "Run") -> list[str]:
    if not run.manifest["identity"].get("languages"):
        return []
    from t2iprobe.hypernymy.languages import describe_languages

    return describe_languages(run)


def _print_results(
    results: dict[str, Any], as_json: bool, last: str | None, more: Sequence[str] = ()
) -> None:
    lines = []
    for key, label in (("isp", "in-subtree probability"), ("scs", "subtree coverage score")):
        found = results["results"][key]
        if found["value"] is not None:
            interval = "  [{:.4f}, {:.4f}]".format(*found["interval"]) if found["interval"] else ""
            lines.append(f"{label:24} {found['value']:.4f}{interval}")
    rows = results["synsets"]
    lines.append(f"{'known synsets':24} {sum(row['known'] for row in rows)} of {len(rows)}")
    if "until" in results:
        from t2iprobe.hypernymy.adaptive_results import describe_lines

        lines += describe_lines(results["until"])
    print_found(results, as_json, "\n".join([*lines, *more, *([last] if last else [])]))


if __name__ == "__main__":
    main()

"""More commands of ``t2iprobe llm``: what to ask, in which words, and how far to trust the answer."""

from pathlib import Path
from typing import Annotated, Any

import typer

from t2iprobe.cli_llm import Budget, Device, Draft, Dtype, Link, Memory, Model, Tree, llm
from t2iprobe.cli_llm import _load as load
from t2iprobe.console import AsJson, print_found
from t2iprobe.errors import UserError

__all__ = ["llm"]


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} takes numbers by commas, such as 0,2, not {text!r}") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


@llm.command()
def templates(
    data: Annotated[str, typer.Option(help="wordnet, vader, bbc, or a CSV with the columns text and label.")],
    out: Annotated[Path, typer.Option(help="Folder to write; the same command continues it.")],
    model: Annotated[
        list[str] | None, typer.Option(help="smollm2, a folder or a hub id; several: repeat it.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="direct, direct-label, channel, calibrate; several by commas.")
    ] = "direct",
    shots: Annotated[str, typer.Option(help="Demonstrations before each text; several by commas.")] = "0",
    count: Annotated[int, typer.Option(help="Templates, drawn at random with replacement.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the templates and the demonstrations.")] = 59,
    ensemble: Annotated[int, typer.Option(help="Largest ensemble of templates.")] = 5,
    selection: Annotated[str, typer.Option(help="Of demonstrations: random, nearest or topic.")] = "random",
    grid: Annotated[
        str | None, typer.Option(help="sentiment, topic (as published) or gloss; by default the data's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Classify so many texts at most.")] = 200,
    dtype: Dtype = "auto",
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the templates and the cost; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Classify texts under many prompt templates: how far accuracy moves, and what ensembles gain."""
    from t2iprobe.devices import resolve_device
    from t2iprobe.llm.labelled_data import load_labelled
    from t2iprobe.llm.template_study import TemplateStudy, plan_study, run_study
    from t2iprobe.progress import progress_bar

    study = TemplateStudy(
        models=tuple(model or ["smollm2"]),
        methods=_words(method),
        shots=_numbers(shots, "--shots"),
        count=count,
        template_seed=seed,
        seed=seed,
        selection=selection,
        grid=grid,
        ensemble=ensemble,
        limit=limit,
        dtype=dtype,
        device=resolve_device(device),
    )
    labelled = load_labelled(data)
    if dry_run:
        plan = plan_study(study, labelled)
        lines = [
            *plan["templates"],
            f"{plan['classifications']} classifications of {plan['texts']} texts, {plan['rows']} tokens",
        ]
        print_found(plan, as_json, "\n".join(lines))
        return
    with progress_bar("templates") as show:
        results = run_study(study, labelled, out, show=show)
    print_found(results, as_json, _describe_templates(results, out))


def _describe_templates(results: dict[str, Any], out: Path) -> str:
    from t2iprobe.spread import describe_spread

    lines = [
        f"{results['texts']} texts of {results['data']}; chance {results['chance']:.3f}, "
        f"the most frequent label {results['majority']:.3f}",
        f"{'model':>20}{'method':>14}{'shots':>7}{'mean':>8}{'sd':>8}{'least':>8}{'most':>8}{'ensemble':>10}",
    ]
    for run, grown in zip(results["runs"], results["ensembles"], strict=True):
        spread = describe_spread(run["scores"])
        lines.append(
            f"{run['model'][-18:]:>20}{run['method']:>14}{run['shots']:7}"
            f"{spread['mean']:8.3f}{spread['sd']:8.3f}{spread['min']:8.3f}{spread['max']:8.3f}{grown['sizes'][-1]['mean']:10.3f}"
        )
    return "\n".join([*lines, f"report: {out / 'report.html'}"])


@llm.command()
def prompts(
    synsets: Annotated[
        str, typer.Option(help="Names, wnids or lemmas by commas, or a file with one a line.")
    ],
    out: Annotated[Path, typer.Option(help="JSONL to write; the same command continues it.")],
    per_synset: Annotated[int, typer.Option(help="Prompts for each synset.")] = 8,
    rounds: Annotated[int, typer.Option(help="How often a rejected prompt is written again.")] = 2,
    model: Model = "smollm2",
    draft: Draft = None,
    tree: Tree = "best-first",
    budget: Budget = None,
    batch: Annotated[int, typer.Option(help="Prompts that share each pass.")] = 8,
    throughput: Annotated[
        bool, typer.Option("--throughput", help="Write all of them in large blocks, without a draft.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Above 0: more varied.")] = 0.9,
    top_p: Annotated[float, typer.Option(help="Draw among the tokens that make up this much.")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a prompt at most.")] = 48,
    unsupported: Annotated[int, typer.Option(help="Objects that nothing ties to the synset, at most.")] = 3,
    min_gloss_pmi: Annotated[float, typer.Option(help="Nats that the gloss must add.")] = 0.0,
    min_sibling: Annotated[float, typer.Option(help="Nats above the sibling's name.")] = 0.0,
    min_isa: Annotated[
        float | None, typer.Option(help="Nats above the hypernym's sibling; not asked by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    memory: Memory = None,
    link: Link = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Write prompts for synsets, each checked against the gloss and written again where it fails."""
    from t2iprobe.devices import resolve_device
    from t2iprobe.llm.commands import parse_bytes
    from t2iprobe.llm.faithfulness import Limits
    from t2iprobe.llm.prompts import EngineWriter, ThroughputWriter, Writing, find_synsets, write_prompts
    from t2iprobe.progress import progress_bar

    limits = Limits(unsupported=unsupported, gloss_pmi=min_gloss_pmi, sibling=min_sibling, isa=min_isa)
    writing = Writing(per_synset, rounds, temperature, top_p, max_new_tokens, seed, limits)
    found = find_synsets(synsets)
    if throughput:
        if draft not in (None, "none"):
            raise UserError(f"--throughput writes without a draft: leave --draft {draft} out")
        blocks = ThroughputWriter(
            out,
            model,
            memory=None if memory is None else parse_bytes(memory),
            link=None if link is None else parse_bytes(link),
            dtype=dtype,
            device=resolve_device(device),
        )
        with progress_bar("prompts") as show:
            made = write_prompts(found, out, blocks, writing, model=model, block=None, show=show)
    else:
        with load(model, draft, memory, link, dtype, device) as engine, progress_bar("prompts") as show:
            writer = EngineWriter(engine, batch, tree, budget)
            made = write_prompts(found, out, writer, writing, model=model, show=show)
    print_found(made, as_json, _describe_prompts(made))


def _describe_prompts(made: dict[str, Any]) -> str:
    return (
        f"{made['prompts']} prompts for {made['synsets']} synsets in {made['seconds']:.1f} s; "
        f"{made['accepted_first']['value']:.0%} passed at first, {made['accepted']['value']:.0%} in the end "
        f"({made['attempts']} attempts, {made['plain_templates']} plain templates) → {made['out']}"
    )


@llm.command()
def evaluate(
    out: Annotated[Path, typer.Option(help="Folder to write; the same command continues it.")],
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, by commas.")] = None,
    suite: Annotated[str | None, typer.Option(help="hallucination or wordnet.")] = None,
    data: Annotated[
        str, typer.Option(help="Where the suite's data come from: packages, or hub (the harness's own).")
    ] = "packages",
    limit: Annotated[int | None, typer.Option(help="Documents of each task at most.")] = None,
    shots: Annotated[int | None, typer.Option(help="Demonstrations; by default each task's own.")] = None,
    model: Model = "smollm2",
    draft: Draft = None,
    tree: Tree = "best-first",
    budget: Budget = None,
    batch: Annotated[int, typer.Option(help="Prompts that share each pass of a generation.")] = 8,
    memory: Memory = None,
    link: Link = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be run; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Judge the writer: any task of lm-evaluation-harness, or how often it hallucinates, by class."""
    if (tasks is None) == (suite is None):
        raise UserError("give --tasks NAME,… or --suite hallucination")
    if limit is not None and limit < 1:
        raise UserError(f"evaluate 1 document or more, not {limit}")
    from t2iprobe.llm.evaluation import evaluate as run
    from t2iprobe.llm.evaluation import plan_suite, plan_tasks

    left_out: dict[str, str] = {}
    if tasks is not None:
        planned = plan_tasks(_words(tasks))
    else:
        planned, left_out = plan_suite(suite or "", data)
    if dry_run:
        plan = {"tasks": {each.name: each.task for each in planned}, "left_out": left_out}
        lines = [f"{name:24} {task}" for name, task in plan["tasks"].items()]
        lines += [f"{name:24} left out: {reason}" for name, reason in left_out.items()]
        print_found(plan, as_json, "\n".join(lines))
        return
    from t2iprobe.llm.commands import choose_trees
    from t2iprobe.progress import progress_bar

    with load(model, draft, memory, link, dtype, device) as engine, progress_bar("tasks") as show:
        trees = choose_trees(engine, tree, budget, 24, "auto", batch)
        results = run(
            engine,
            planned,
            out,
            limit=limit,
            shots=shots,
            left_out=left_out,
            trees=trees,
            batch=batch,
            show=show,
        )
    print_found(results, as_json, _describe_scores(results, out))


def _describe_scores(results: dict[str, Any], out: Path) -> str:
    lines = []
    for line in results["t2iprobe"]:
        cost = _describe_cost(line["cost"])
        if "kind" in line:
            score = _describe_score(line)
            lines.append(f"{line['name']:24}{line['kind']:14}{line['metric']:18}{score:24}{cost}")
        else:
            found = {k: v for k, v in line["metrics"].items() if "," in k and isinstance(v, float)}
            lines += [f"{line['name']:24}{key:32}{value:<24.4f}{cost}" for key, value in found.items()]
    for kind in ("factuality", "faithfulness"):
        if found := results[kind]:
            lines.append(f"{kind:24}mean of {found['tasks']} tasks: {_describe_score(found)}")
    if results["left_out"]:
        lines.append(f"left out: {', '.join(results['left_out'])}")
    return "\n".join([*lines, f"report: {out / 'report.html'}"])


def _describe_score(found: dict[str, Any]) -> str:
    within = "" if found["interval"] is None else " [{:.3f}, {:.3f}]".format(*found["interval"])
    return f"{found['value']:.3f}{within}"


def _describe_cost(cost: dict[str, Any]) -> str:
    """Return tokens a second, and for answers that were written tokens a pass, which the draft saves."""
    told = []
    if cost["scored_tokens"]:
        told.append(f"{cost['scored_tokens_per_second']:.0f} tokens/s scored")
    if cost["written_tokens"]:
        told.append(
            f"{cost['written_tokens_per_second']:.1f} tokens/s written, {cost['tokens_per_pass']:.2f} a pass"
        )
    return "; ".join(told)

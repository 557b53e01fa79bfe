"""The commands of ``t2iprobe llm corpus``: words in, calls out."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from t2iprobe.console import AsJson, print_found
from t2iprobe.errors import UserError

corpus = typer.Typer(
    help="Annotate, filter and deduplicate prompts and captions, and show what a filter does.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Documents = Annotated[
    Path, typer.Argument(metavar="IN", help="jsonl, txt (a text a line) or parquet; .gz of the first two.")
]
Output = Annotated[Path, typer.Option("--out", "-o", help="File to write; .gz is zipped.")]
Field = Annotated[str, typer.Option(help="Which field of a row holds the text.")]
Longest = Annotated[int, typer.Option(help="Bytes of a line; a longer one is set aside.")]
Processes = Annotated[int, typer.Option(help="How many; the output is the same.")]
Cluster = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster, or local: the same output by Ray Data.")
]
Shingle = Annotated[str, typer.Option(help="Words of a shingle, or characters as in char-5.")]


def _stream(unit: str, call: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    from t2iprobe.progress import progress_bar

    try:
        with progress_bar(unit) as show:
            return call(show)
    except KeyboardInterrupt:
        print("t2iprobe: stopped; the same command continues", file=sys.stderr)
        sys.exit(130)


def _executor(processes: int, cluster: str | None) -> Any:
    if cluster is not None:
        from t2iprobe.llm.corpus.cluster import on_ray

        return on_ray(cluster)
    from t2iprobe.llm.corpus.streaming import in_processes

    return in_processes(processes)


def _aside(found: dict[str, Any]) -> str:
    if not found["rejected"]:
        return ""
    return f"; {found['rejected']} lines are no rows: {found['rejected_file']}"


@corpus.command()
def signals(
    documents: Documents,
    out: Output,
    language: Annotated[str, typer.Option(help="Of the stop words and the blocklist.")] = "en",
    target: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file of corpus train or of fastText (.bin, .ftz), which adds signals; repeat it."
        ),
    ] = None,
    domains: Annotated[
        Path | None, typer.Option(help="JSON of a domain's number in the UT1 blacklist.")
    ] = None,
    captions: Annotated[bool, typer.Option(help="Our own signals for prompts, too.")] = True,
    tokenizer: Annotated[
        str, typer.Option(help="Whose tokens to count: embedded, clip (of open-clip-torch), a folder, none.")
    ] = "embedded",
    shingle: Shingle = "13",
    field: Field = "text",
    longest_line: Longest = 64 << 20,
    processes: Processes = 1,
    cluster: Cluster = None,
    as_json: AsJson = False,
) -> None:
    """Write a row's quality signals and MinHash bands for each row. The texts stay as they are."""
    from t2iprobe.llm.corpus.annotation import make_annotation
    from t2iprobe.llm.corpus.documents import Source
    from t2iprobe.llm.corpus.streaming import stream

    source = Source.open(documents, field, longest_line)
    stage = make_annotation(language, domains, captions, tokenizer, shingle, target or [])
    execute = _executor(processes, cluster)
    found = _stream("bytes", lambda show: stream(stage, source, out, execute=execute, show=show))
    short = found.get("too_short_for_minhash", 0)
    text = f"{found['rows']} rows, {short} too short for a MinHash of {shingle}{_aside(found)} → {out}"
    print_found(found, as_json, text)


@corpus.command()
def train(
    target: Annotated[Path, typer.Option(help="Texts as they should be.")],
    source: Annotated[Path, typer.Option(help="Texts as they are.")],
    out: Output,
    name: Annotated[str, typer.Option(help="Of the signals, such as wikiref.")] = "target",
    limit: Annotated[int, typer.Option(help="Texts of each file at most.")] = 75_000,
    field: Field = "text",
    as_json: AsJson = False,
) -> None:
    """Learn what your target looks like: importance weights and a classifier, for corpus signals --target."""
    from t2iprobe.llm.corpus.documents import Source
    from t2iprobe.llm.corpus.importance import train_target

    if limit < 20:
        raise UserError(f"a limit of 20 texts is the least, not {limit}")
    found = train_target(name, Source.open(target, field), Source.open(source, field), out, limit)
    accuracy = found["accuracy"]
    judged = ""
    if accuracy is not None:
        low_high = "" if accuracy["interval"] is None else " [{:.3f}, {:.3f}]".format(*accuracy["interval"])
        judged = f"; {accuracy['value']:.3f}{low_high} of {found['held_out']} unseen texts told apart"
    text = f"{found['target_texts']} texts of the target, {found['source_texts']} others{judged} → {out}"
    print_found(found, as_json, text)


@corpus.command()
def dedup(
    documents: Documents,
    out: Output,
    similarity: Annotated[float, typer.Option(help="Jaccard of two texts' shingles.")] = 0.8,
    shingle: Shingle = "2",
    bands: Annotated[
        str,
        typer.Option(help="sure: pairs are found and then compared; published: RedPajama-V2's, uncompared."),
    ] = "sure",
    hasher: Annotated[str, typer.Option(help="sha1 as published, or rensa (Rust): faster.")] = "sha1",
    field: Field = "text",
    longest_line: Longest = 64 << 20,
    processes: Processes = 1,
    cluster: Cluster = None,
    as_json: AsJson = False,
) -> None:
    """Write the rows without duplicates, exact and near, and which line is a duplicate of which."""
    from t2iprobe.llm.corpus.dedup import check_choices, deduplicate
    from t2iprobe.llm.corpus.documents import Source
    from t2iprobe.llm.corpus.minhash import read_size

    source, size = Source.open(documents, field, longest_line), read_size(shingle)
    how = check_choices(bands, hasher)
    execute = _executor(processes, cluster)
    found = _stream(
        "bytes",
        lambda show: deduplicate(
            source, out, similarity=similarity, size=size, execute=execute, show=show, **how
        ),
    )
    text = (
        f"{found['kept']} of {found['rows']} rows; {found['exact_duplicates']} equal an earlier one, "
        f"{found['near_duplicates']} nearly{_aside(found)} → {out}"
    )
    print_found(found, as_json, text)


@corpus.command("filter")
def filter_rows(
    documents: Documents,
    signals: Annotated[Path, typer.Argument(metavar="SIGNALS", help="What corpus signals wrote of IN.")],
    out: Output,
    recipe: Annotated[
        str, typer.Option(help="gopher, c4, refinedweb, wikipedia-reference, dsir, caption or a YAML file.")
    ],
    report: Annotated[
        bool, typer.Option("--report", help="Show what each rule removes, with examples.")
    ] = False,
    field: Field = "text",
    longest_line: Longest = 64 << 20,
    processes: Processes = 1,
    cluster: Cluster = None,
    as_json: AsJson = False,
) -> None:
    """Write the rows that a recipe keeps. What stays depends on the signals alone."""
    from t2iprobe.llm.corpus.documents import Source
    from t2iprobe.llm.corpus.filters import filter_file, load_recipe

    rules, source = load_recipe(recipe), Source.open(documents, field, longest_line)
    execute = _executor(processes, cluster)
    found = _stream(
        "bytes",
        lambda show: filter_file(source, signals, rules, out, report=report, execute=execute, show=show),
    )
    cut = f", {found['lines_cut']} lines cut" if rules.lines else ""
    text = f"{found['kept']} of {found['rows']} rows{cut}{_aside(found)} → {out}"
    print_found(found, as_json, f"{_describe_rules(found)}\n{text}" if report else text)


def _describe_rules(found: dict[str, Any]) -> str:
    lines = [f"{'removed':>9}{'alone':>8}  rule"]
    for row in sorted(found["rules"], key=lambda row: -row["removed"]):
        lines.append(f"{row['removed']:9}{row['removed_alone']:8}  {row['rule']}")
        for example in row["examples"]:
            value = "none" if example["value"] is None else f"{example['value']:.4g}"
            lines.append(f"{'':19}{value:>8}  {' '.join(example['text'].split())[:70]}")
    return "\n".join(lines)


@corpus.command()
def ablate(
    documents: Annotated[
        Path | None, typer.Argument(metavar="[IN]", help="Texts to filter; a tenth is kept to judge by.")
    ] = None,
    recipes: Annotated[str, typer.Option(help="By commas; none keeps everything.")] = "none,gopher",
    target: Annotated[
        list[Path] | None,
        typer.Option(help="For recipes such as dsir: texts as they should be, or a file of corpus train."),
    ] = None,
    texts: Annotated[list[str] | None, typer.Option(help="NAME=FILE of a mix; repeat it.")] = None,
    mix: Annotated[
        list[str] | None, typer.Option(help="NAME:WEIGHT by commas, such as en:1,es-mt:1; repeat it.")
    ] = None,
    judge: Annotated[Path | None, typer.Option(help="Texts to judge by, such as human ones.")] = None,
    language: Annotated[str, typer.Option(help="Of the signals.")] = "en",
    hidden: Annotated[int, typer.Option(help="Size of the Llama, a multiple of 32.")] = 128,
    layers: Annotated[int, typer.Option(help="Of the Llama.")] = 4,
    tokens: Annotated[int, typer.Option(help="That each model trains on.")] = 1_000_000,
    seeds: Annotated[int, typer.Option(help="Models of each kind.")] = 3,
    field: Field = "text",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; the same command continues.")] = Path(
        "ablation"
    ),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be trained.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train small Llamas on what each recipe keeps, and compare them on the same held-out texts."""
    from t2iprobe.llm.corpus.ablation import Training, tabulate
    from t2iprobe.llm.corpus.arms import Plan, run_plan

    training = Training(hidden, layers, tokens)
    plan = Plan(documents, recipes.split(","), target or [], texts or [], mix or [], judge, language, field)
    if dry_run:
        arms = plan.names
        found: dict[str, Any] = {"arms": arms, "seeds": seeds, "steps": training.steps, "tokens": tokens}
        print_found(
            found, as_json, f"{len(arms)} × {seeds} models of {training.steps} steps: {', '.join(arms)}"
        )
        return
    found = _stream("steps", lambda show: run_plan(plan, out, training, seeds, show))
    warning = f"\n{found['warning']}" if found["warning"] else ""
    print_found(found, as_json, f"{tabulate(found)}{warning}")


def translate(
    documents: Documents,
    out: Output,
    to: Annotated[str, typer.Option(help="Languages by commas: fr, de, es.")],
    backend: Annotated[
        str, typer.Option(help="apertium, engine, seq2seq (with --model) or dictionary (templates only).")
    ] = "dictionary",
    model: Annotated[
        str | None,
        typer.Option(help="Of engine or seq2seq: a folder or hub id; {to} stands for the language."),
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Which field holds the text; text, or prompt where there is none.")
    ] = None,
    words: Annotated[
        str | None, typer.Option(help="Sources of words by commas: omw, emoji, apertium, freedict.")
    ] = None,
    round_trip: Annotated[
        bool, typer.Option("--round-trip", help="Translate back, too, and compare by chrF.")
    ] = False,
    least_chrf: Annotated[float, typer.Option(help="Of the way back, for a row to be ok.")] = 20.0,
    memory: Annotated[str | None, typer.Option(help="Bytes for the engine's weights, such as 300MB.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Translate prompts or texts from English: a row out for each row and language, concepts protected."""
    from t2iprobe.devices import resolve_device
    from t2iprobe.llm.corpus.documents import Source
    from t2iprobe.llm.translation import Translation, detect_field, translate_file
    from t2iprobe.llm.translators import check_backend, make_translator

    languages = [language.strip() for language in to.split(",")]
    budget = None
    if memory is not None:
        from t2iprobe.llm.commands import parse_bytes

        budget = parse_bytes(memory)
    translator = make_translator(backend, model, resolve_device(device), budget)
    check_backend(translator, languages)
    source = Source.open(documents, field or detect_field(documents))
    sources = None if words is None else [word.strip() for word in words.split(",")]
    stage = Translation(translator, languages, source.field, sources, round_trip, least_chrf)
    found = _stream("bytes", lambda show: translate_file(source, out, stage, show))
    lines = [f"{found['rows']} rows{_aside(found)} → {out}"]
    for language in languages:
        made, ok, concepts, there = (
            found.get(f"{language}: {name}", 0)
            for name in ("translated", "ok", "with a word", "concept there")
        )
        share = f", {there} have the word for their concept, of {concepts} that are known" if concepts else ""
        lines.append(f"{language}: {made} translated, {ok} pass the checks{share}")
    print_found(found, as_json, "\n".join(lines))

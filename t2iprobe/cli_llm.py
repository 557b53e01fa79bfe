"""The commands of ``t2iprobe llm``: words in, calls out."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2iprobe.cli_corpus import corpus, translate
from t2iprobe.cli_swarm import swarm as swarm_commands
from t2iprobe.console import AsJson, print_found
from t2iprobe.errors import UserError

if TYPE_CHECKING:
    from t2iprobe.llm.commands import Engine

llm = typer.Typer(
    help="Write with a language model that is larger than the memory it runs in.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
llm.add_typer(swarm_commands, name="swarm")

llm.add_typer(corpus, name="corpus")
llm.command()(translate)

Model = Annotated[str, typer.Option(help="smollm2, a folder or a hub id.")]
Draft = Annotated[
    str | None,
    typer.Option(
        help="Who guesses: student, early-exit:K, lookup, copy:BITS, none, a folder or a hub id; "
        "student for smollm2, lookup for others."
    ),
]
Tree = Annotated[str, typer.Option(help="best-first, optimal, chain or none.")]
Budget = Annotated[
    int | None, typer.Option(help="Guesses a tree; by default what is measured to be the fastest.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Bytes for the weights of model and draft, such as 300MB: other layers are read from disk."
    ),
]
Link = Annotated[
    str | None, typer.Option(help="Bytes a second of a simulated link to the weights, such as 250MB.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]


def _load(
    model: str, draft: str | None, memory: str | None, link: str | None, dtype: str, device: str
) -> "Engine":
    from t2iprobe.devices import resolve_device
    from t2iprobe.llm.commands import load_engine, parse_bytes

    return load_engine(
        model,
        draft,
        memory=None if memory is None else parse_bytes(memory),
        link=None if link is None else parse_bytes(link),
        dtype=dtype,
        device=resolve_device(device),
    )


@llm.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to answer; - reads it from stdin.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL with rows of prompt or messages; one JSON line out for each.")
    ] = None,
    model: Model = "smollm2",
    draft: Draft = None,
    tree: Tree = "best-first",
    budget: Budget = None,
    depth: Annotated[int, typer.Option(help="Levels of a tree at most.")] = 24,
    verifier: Annotated[str, typer.Option(help="auto, match or residual: both are exact.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the most probable token each time.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the tokens that make up this much.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Draw among tokens at least this probable, beside the best.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    no_repeat_ngram: Annotated[int, typer.Option(help="Never repeat so many tokens in a row; 0: off.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends the answer; several: repeat it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    system: Annotated[str | None, typer.Option(help="What the model is told to be.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, without the chat template.")] = False,
    batch: Annotated[
        int | None,
        typer.Option(help="Prompts of a file that share each pass; 1, or with --throughput what is fastest."),
    ] = None,
    throughput: Annotated[
        bool,
        typer.Option(
            "--throughput",
            help="Write a file of prompts in blocks, without a draft; continued if it was killed.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="JSONL that --throughput writes; by default PROMPTS.texts.jsonl, beside PROMPTS."),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(help="Batches that share each load of a layer; by default what is predicted fastest."),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="4: blocks of weights and cache in 4 bits.")] = None,
    disk: Annotated[Path | None, typer.Option(help="Folder for a block's cache that memory lacks.")] = None,
    memory: Memory = None,
    link: Link = None,
    swarm: Annotated[
        list[str] | None,
        typer.Option(help="Address of a swarm that serves the model's blocks; several: repeat it."),
    ] = None,
    eight_bits: Annotated[
        bool, typer.Option("--eight-bits", help="Send a swarm hidden states in 8 bits.")
    ] = False,
    allow: Annotated[
        list[str] | None, typer.Option(help="Id of a peer of the swarm that may be asked, and no other.")
    ] = None,
    soft_prompt: Annotated[
        Path | None, typer.Option(help="File of llm swarm tune, to stand before every prompt.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, or a file of them. The text is what the model alone would write."""
    if (prompt is None) == (prompts is None):
        raise UserError('give one prompt, or --prompts FILE: t2iprobe llm generate "A poem about a heron"')
    if batch is not None and batch < 1:
        raise UserError(f"a batch has 1 prompt or more, not {batch}")
    from t2iprobe.llm.commands import choose_trees, read_prompts, write_texts
    from t2iprobe.llm.engine.processing import Sampling
    from t2iprobe.storage import is_utf8

    for name, words in (("the prompt", prompt), ("--system", system), ("--stop", stop)):
        if not is_utf8(words):
            raise UserError(f"{name} is not UTF-8")

    if swarm:
        from t2iprobe.llm.swarm.client import BUDGET, describe_swarm

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram, seed)
    if throughput:
        if prompts is None:
            raise UserError("--throughput writes a file from a file: give --prompts FILE")
        if swarm:
            raise UserError("--throughput reads the weights here: leave --swarm out")
        if draft not in (None, "none"):
            raise UserError(f"--throughput writes without a draft: leave --draft {draft} out")
        made = _write_blocks(
            prompts, out or prompts.with_suffix(".texts.jsonl"), (batch, block, bits), memory, link, device,
            model=model, disk=disk, sampling=sampling, max_new_tokens=max_new_tokens, stop=stop or [],
            raw=raw, system=system, dtype=dtype,
        )  # fmt: skip
        print_found(made, as_json, _describe_blocks(made))
        return
    given = {"--out": out, "--block": block, "--bits": None if swarm else bits, "--disk": disk}
    if lacking := [name for name, value in given.items() if value is not None]:
        raise UserError(f"{lacking[0]} is of --throughput: give that, too")
    rows = (
        read_prompts(prompts)
        if prompts is not None
        else [{"prompt": _read_stdin() if prompt == "-" else prompt}]
    )
    if swarm:
        if memory is not None or link is not None:
            raise UserError("a swarm holds the weights: leave --memory and --link out")
        loaded = _load_from_swarm(
            model, draft, swarm, dtype=dtype, device=device, bits=bits, allowed=allow,
            eight_bits=eight_bits, soft_prompt=soft_prompt,
        )  # fmt: skip
        budget = BUDGET if budget is None else budget
    else:
        if eight_bits or allow or soft_prompt is not None:
            raise UserError("--eight-bits, --allow and --soft-prompt are of --swarm: give an address, too")
        loaded = _load(model, draft, memory, link, dtype, device)
    with loaded as engine:
        streams = prompts is None and not as_json
        texts = write_texts(
            engine,
            rows,
            sampling=sampling,
            trees=choose_trees(engine, tree, budget, depth, verifier, batch or 1),
            max_new_tokens=max_new_tokens,
            stop=stop or [],
            raw=raw,
            system=system,
            batch=batch or 1,
            on_text=(lambda _, text: print(text, end="", flush=True)) if streams else None,
        )
        for made in texts:
            if swarm:
                made |= describe_swarm(engine)
            if prompts is not None:
                print(json.dumps(made, ensure_ascii=False), flush=True)
            elif as_json:
                print(json.dumps(made, ensure_ascii=False, indent=1))
            else:
                print()
                print(_describe(made), file=sys.stderr)


def _read_stdin() -> str:
    try:
        text = sys.stdin.read()
        text.encode()  # in some locales stray bytes come as halves of surrogate pairs
    except UnicodeError:
        raise UserError("the prompt is not UTF-8") from None
    return text


def _load_from_swarm(
    model: str, draft: str | None, peers: list[str], *, device: str, eight_bits: bool, **how: Any
) -> "Engine":
    from t2iprobe.devices import resolve_device
    from t2iprobe.llm.swarm.client import load_swarm_engine
    from t2iprobe.llm.swarm.session import Settings

    return load_swarm_engine(
        model, peers, draft, device=resolve_device(device), settings=Settings(eight_bits=eight_bits), **how
    )


def _write_blocks(
    prompts: Path,
    out: Path,
    shape: tuple[int | None, int | None, int | None],
    memory: str | None,
    link: str | None,
    device: str,
    **settings: Any,
) -> dict[str, Any]:
    from t2iprobe.devices import resolve_device
    from t2iprobe.llm.commands import parse_bytes
    from t2iprobe.llm.throughput import Block, write_file
    from t2iprobe.progress import progress_bar

    with progress_bar("prompts") as show:
        return write_file(
            prompts,
            out,
            block=Block(*shape),
            memory=None if memory is None else parse_bytes(memory),
            link=None if link is None else parse_bytes(link),
            device=resolve_device(device),
            show=show,
            **settings,
        )


def _describe_blocks(made: dict[str, Any]) -> str:
    if not made["written"]:
        return f"{made['out']} was done before: {made['prompts']} texts"
    where = made["placement"]
    before = f" ({made['done_before']} were there)" if made["done_before"] else ""
    peak = made["peak_bytes"].get("device", 0)
    budget = "" if made["budget_bytes"] is None else f" of {made['budget_bytes'] / 1e6:.0f}"
    return (
        f"{made['written']} texts{before}, {made['tokens']} tokens in {made['seconds']:.1f} s: "
        f"{made['tokens_per_second']:.1f} a second; blocks of {where['batches']} × {where['batch']}, "
        f"{made['weight_bytes_per_token'] / 1e6:.1f} MB of weights read a token, "
        f"{peak / 1e6:.0f}{budget} MB of memory at most → {made['out']}\n\n{_describe_shares(where)}"
    )


def _describe(made: dict[str, Any]) -> str:
    count = len(made["token_ids"])
    read = (
        f", {made['weight_bytes_read'] / count / 1e6:.0f} MB read a token"
        if made["weight_bytes_read"]
        else ""
    )
    lost = f", {made['reroutes']} spans of failed servers taken over" if made.get("reroutes") else ""
    return (
        f"{count} tokens in {made['seconds']:.1f} s, {made['tokens_per_pass']:.2f} a pass of the model{read} "
        f"({made['stop_reason']}{lost})"
    )


@llm.command()
def plan(
    model: Model = "smollm2",
    draft: Draft = None,
    memory: Memory = None,
    link: Link = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt, for --throughput.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens written behind each.")] = 32,
    prompts: Annotated[
        int | None, typer.Option(help="How many prompts there are; by default as many as a block can hold.")
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="Batches that share each load of a layer; by default what is best.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Prompts of a forward; by default what is best.")] = None,
    bits: Annotated[int | None, typer.Option(help="4: weights and cache may be held in 4 bits.")] = None,
    disk: Annotated[Path | None, typer.Option(help="Folder for a block's cache that memory lacks.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    measure: Annotated[bool, typer.Option("--measure", help="Measure again, whatever is kept.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure passes on this machine, and print which tree pays and which blocks of prompts."""
    from t2iprobe.devices import resolve_device
    from t2iprobe.llm.commands import parse_bytes, plan_trees
    from t2iprobe.llm.planning import plan_placement

    if bits not in (None, 4):
        raise UserError(f"weights and cache are held as they are or in 4 bits, not in {bits}")
    with _load(model, draft, memory, link, dtype, device) as engine:
        found = plan_trees(engine, measure=measure)
    found |= plan_placement(
        model,
        memory=None if memory is None else parse_bytes(memory),
        link=None if link is None else parse_bytes(link),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prompts=prompts,
        block=block,
        batch=batch,
        bits=bits,
        disk=disk,
        dtype=dtype,
        device=resolve_device(device),
        measure=measure,
    )
    print_found(found, as_json, f"{_describe_plan(found)}\n\n{_describe_placement(found)}")


def _describe_placement(found: dict[str, Any]) -> str:
    placed = found["placement"]
    rate = found["predicted_tokens_per_second"]
    peak = found["predicted_peak_bytes"]
    lines = [
        f"blocks of {placed['batches']} × {placed['batch']} prompts: {rate:.1f} tokens a second predicted",
        _describe_shares(placed),
        f"{'MB at most':>16}" + "".join(f"{peak[tier] / 1e6:8.0f}" for tier in peak),
        "",
        f"what limits it: {found['binding']}",
    ]
    saved = found["saved_by_a_tenth_more"]
    for name in sorted(saved, key=lambda name: -saved[name]):
        if saved[name] > 5e-4:
            lines.append(f"{name + ', a tenth more':>40}: {saved[name]:6.1%} of the seconds saved")
    for more in found["more_memory"]:
        better = more["predicted_tokens_per_second"]
        much = "" if more["memory"] is None else f" ({more['memory'] / 1e6:.0f} MB)"
        label = f"{more['factor']:g} times the memory{much}"
        lines.append(f"{label:>40}: {better:6.1f} tokens a second ({better / rate - 1:+.0%})")
    return "\n".join(lines)


def _describe_shares(placed: dict[str, Any]) -> str:
    """Return what lies where, as it was asked for and as it is, in layers, chunks and batches."""
    tiers, bits = ("device", "ram", "disk"), {"weights": placed["weight_bits"], "cache": placed["cache_bits"]}
    lines = [f"{'':>16}{'device':>8}{'RAM':>8}{'disk':>8}   asked for"]
    for name, real in placed["realised"].items():
        label = name + (f", {bits[name]} bits" if bits.get(name) else "")
        asked = placed["asked"][name]
        lines.append(
            f"{label:>16}{''.join(f'{real[tier]:8.1%}' for tier in tiers)}"
            f"   {' / '.join(f'{asked[tier]:.1%}' for tier in tiers)}"
        )
    return "\n".join(lines)


def _describe_plan(found: dict[str, Any]) -> str:
    best: dict[int, dict[str, Any]] = {}
    for row in found["table"]:
        if row["budget"] not in best or row["token_seconds"] < best[row["budget"]]["token_seconds"]:
            best[row["budget"]] = row
    streamed = found["resident_layers"]
    lines = [
        f"{found['model']}, draft {found['draft']}, "
        f"{found['resident_bytes'] / 1e6:.0f} MB of weights in memory"
        + ("" if streamed is None else f", {streamed} layers stay"),
        "children accepted, by rank: " + " ".join(f"{share:.3f}" for share in found["acceptance"][:8]),
        "",
        f"{'guesses':>8}{'levels':>8}{'tokens a pass':>15}{'draft s':>9}{'target s':>10}{'s a token':>11}",
    ]
    for row in best.values():
        chosen = " ←" if row == found["choice"] else ""
        lines.append(
            f"{row['budget']:8}{row['depth']:8}{row['expected_tokens']:15.2f}{row['draft_seconds']:9.3f}"
            f"{row['target_seconds']:10.3f}{row['token_seconds']:11.4f}{chosen}"
        )
    return "\n".join(lines)


@llm.command()
def bench(
    prompts: Annotated[Path | None, typer.Option(help="JSONL with rows of prompt or messages.")] = None,
    model: Model = "smollm2",
    draft: Draft = None,
    budget: Annotated[list[int] | None, typer.Option(help="Guesses a tree; several: repeat it.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 64,
    memory: Memory = None,
    link: Link = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare trees on your prompts: tokens a pass, seconds a token."""
    from t2iprobe.llm.commands import compare_trees, read_prompts

    rows = read_prompts(prompts) if prompts else [{"prompt": text} for text in _BENCH_PROMPTS]
    with _load(model, draft, memory, link, dtype, device) as engine:
        found = compare_trees(engine, rows, budget or [16, 64], max_new_tokens)
    lines = [f"{'tree':>12}{'guesses':>9}{'tokens a pass':>15}{'s a token':>11}{'MB a token':>12}"]
    for row in found["trees"]:
        lines.append(
            f"{row['tree']:>12}{row['budget']:9}{row['tokens_per_pass']:15.2f}{row['seconds_per_token']:11.4f}"
            f"{row['bytes_per_token'] / 1e6:12.1f}"
        )
    print_found(found, as_json, "\n".join(lines))


_BENCH_PROMPTS = (
    "Write a short caption for a photo of a heron.",
    "Describe a picture of an old lighthouse at dusk in one sentence.",
    "List four prompts for a text-to-image model about a teapot.",
)


@llm.command()
def serve(
    model: Model = "smollm2",
    draft: Draft = None,
    tree: Tree = "best-first",
    budget: Budget = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="T2IPROBE_API_KEY", help="What clients must send.")
    ] = None,
    memory: Memory = None,
    link: Link = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Serve the model to OpenAI's clients: /v1/models, /v1/completions, /v1/chat/completions."""
    from t2iprobe.llm.commands import choose_trees
    from t2iprobe.llm.server import listen, serve_engine

    # Before the model, which may take minutes: a port that is taken is told at once.
    with listen(host, port) as listener, _load(model, draft, memory, link, dtype, device) as engine:
        serve_engine(engine, choose_trees(engine, tree, budget, 24, "auto"), listener, api_key)

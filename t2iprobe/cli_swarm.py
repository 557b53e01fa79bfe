"""The commands of ``t2iprobe llm swarm``: words in, calls out."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from t2iprobe.console import AsJson, print_found, to_json

swarm = typer.Typer(
    help="Serve a model by several machines that come and go.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Peers = Annotated[list[str], typer.Option("--peer", help="Address of one that is there; several: repeat it.")]
Allowed = Annotated[
    list[str] | None,
    typer.Option("--allow", help="Id of a peer that may be spoken to, and no other; several: repeat it."),
]


@swarm.command()
def join(
    model: Annotated[str, typer.Argument(help="smollm2, a folder or a hub id.")],
    blocks: Annotated[
        str | None,
        typer.Option(help="0:10 for these; 10 for so many where they are needed most; by default all."),
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="Address of a peer; without, a swarm begins here.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 0,
    cache: Annotated[str, typer.Option(help="Bytes for the caches of all sessions.")] = "1GiB",
    memory: Annotated[
        str | None,
        typer.Option(help="Bytes for the weights: blocks that do not fit are in a GPU's RAM, or on disk."),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8: hold the weights so.")] = None,
    allow: Allowed = None,
    identity: Annotated[
        Path | None, typer.Option(help="File with the key that the id comes from; made where there is none.")
    ] = None,
    period: Annotated[float, typer.Option(help="Seconds between two announcements.")] = 10.0,
    balance: Annotated[float, typer.Option(help="Seconds between two looks whether to move.")] = 60.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Lend this machine's memory: hold blocks of a model and serve them until Ctrl-C. Prints the address."""
    from t2iprobe.devices import resolve_device
    from t2iprobe.llm.commands import parse_bytes
    from t2iprobe.llm.swarm.joining import Joining
    from t2iprobe.llm.swarm.joining import join as join_swarm
    from t2iprobe.llm.swarm.server import BlockServer, ServerSettings
    from t2iprobe.llm.swarm.transport import Node

    def ready(node: Node, server: BlockServer) -> None:
        found = {
            "address": node.address,
            "peer": node.peer_id,
            "model": server.key.name,
            "blocks": [server.blocks.first, server.blocks.last],
            "of": server.key.blocks,
            "tokens_per_second": server.throughput,
            "cache_bytes": server.budget.total,
            "resident_peak_bytes": server.blocks.peak_bytes["device"],
            "weights": asdict(server.blocks.weights),
        }
        print(node.address, flush=True)
        first, last = server.blocks.first, server.blocks.last
        told = f"blocks {first}:{last} of {server.key.blocks} of {model}, {server.throughput:.1f} tokens/s"
        print(to_json(found) if as_json else told, flush=True)

    join_swarm(
        model,
        Joining(
            blocks=blocks, peers=peer or (), host=host, port=port, dtype=dtype, device=resolve_device(device),
            bits=bits, memory=None if memory is None else parse_bytes(memory), allowed=allow,
            identity=identity, period_seconds=period, balance_seconds=balance,
            settings=ServerSettings(cache_bytes=parse_bytes(cache)),
        ),
        ready=ready,
    )  # fmt: skip


@swarm.command()
def status(peer: Peers, as_json: AsJson = False) -> None:
    """Show who holds what, how fast, and which blocks nobody holds."""
    from t2iprobe.llm.swarm.status import describe_status, read_status

    found = read_status(peer)
    print_found(found, as_json, describe_status(found))


@swarm.command()
def tune(
    examples: Annotated[Path, typer.Argument(help="JSONL with rows of text, and prompt if it follows one.")],
    out: Annotated[Path, typer.Option(help="File for what is taught.")],
    model: Annotated[str, typer.Option(help="smollm2, a folder or a hub id.")] = "smollm2",
    peer: Annotated[
        list[str] | None, typer.Option(help="Address of a swarm; without, the model runs here.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of the soft prompt; 0: none.")] = 8,
    rank: Annotated[
        int, typer.Option(help="Rank of LoRA adapters on your side of each server's blocks; 0: none.")
    ] = 0,
    borders: Annotated[
        str | None,
        typer.Option(
            help="Blocks before which adapters stand, as 0,15; by default where servers' blocks begin."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the examples.")] = 10,
    batch: Annotated[int, typer.Option(help="Examples a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 0.02,
    held_out: Annotated[float, typer.Option(help="Share of the examples that it is judged by.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    bits: Annotated[int | None, typer.Option(help="Bits that the servers hold their weights in.")] = None,
    eight_bits: Annotated[
        bool, typer.Option("--eight-bits", help="Send hidden states and gradients in 8 bits.")
    ] = False,
    allow: Allowed = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Teach a soft prompt, LoRA adapters or both to write as your examples do; the model stays as it is."""
    from t2iprobe.devices import resolve_device
    from t2iprobe.errors import UserError
    from t2iprobe.llm.swarm.client import tune_soft_prompt
    from t2iprobe.llm.swarm.session import Settings
    from t2iprobe.llm.swarm.tuning import Tuning, parse_borders
    from t2iprobe.progress import progress_bar

    if min(epochs, batch) < 1 or min(rows, rank) < 0 or not 0 < held_out < 1 or not learning_rate > 0:
        raise UserError("epochs, batch and learning rate are above 0, and --held-out below 1, too")
    how = Tuning(
        rows=rows,
        rank=rank,
        borders=parse_borders(borders),
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        held_out=held_out,
        seed=seed,
    )
    with progress_bar("steps") as show:
        found = tune_soft_prompt(
            model, examples, out, peer or (), how=how, dtype=dtype, device=resolve_device(device), bits=bits,
            allowed=allow, settings=Settings(eight_bits=eight_bits), show=show,
        )  # fmt: skip
    before, after = found["held_out_loss_before"], found["held_out_loss_after"]
    told = f"held-out loss {before:.3f} → {after:.3f} a token, {found['seconds']:.0f} s → {out}"
    print_found(found, as_json, told)

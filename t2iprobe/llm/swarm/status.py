"""Who holds what in a swarm: servers, speed, room, holes."""

from collections.abc import Sequence
from typing import Any

from t2iprobe.llm.swarm.balancing import Placed, block_throughputs
from t2iprobe.llm.swarm.registry import Announcement, ModelKey, find_models, find_servers
from t2iprobe.llm.swarm.routing import describe_blocks
from t2iprobe.llm.swarm.transport import Node

__all__ = ["describe_status", "read_status"]


def read_status(peers: Sequence[str]) -> dict[str, Any]:
    """Return what the swarm at `peers` says of itself: what `llm swarm status --json` prints.

    Raises UserError where no peer answers.
    """
    with Node(peers) as node:
        models = [_describe_model(key, find_servers(node, key)) for key in find_models(node)]
    return {"peers": list(peers), "models": [model for model in models if model["servers"]]}


def _describe_model(key: ModelKey, servers: dict[str, Announcement]) -> dict[str, Any]:
    placed = [Placed(peer, each.first, each.last, each.throughput) for peer, each in servers.items()]
    found = block_throughputs(placed, key.blocks)
    counts = [sum(each.first <= block < each.last for each in placed) for block in range(key.blocks)]
    return {
        "model": key.name,
        "key": str(key),
        "dtype": key.dtype,
        "bits": key.bits,
        "blocks": key.blocks,
        "holes": [block for block, count in enumerate(counts) if not count],
        "servers_a_block": counts,
        "tokens_per_second": float(found.min()) if len(found) else 0.0,
        "servers": [
            {
                "peer": peer,
                "address": each.addresses[0] if each.addresses else None,
                "first": each.first,
                "last": each.last,
                "state": each.state,
                "tokens_per_second": each.throughput,
                "block_seconds": each.block_seconds,
                "cache_bytes": each.cache_bytes,
                "cache_bytes_left": each.cache_bytes_left,
                "sessions": each.sessions,
                "waiting": each.waiting,
            }
            for peer, each in sorted(servers.items(), key=lambda item: (item[1].first, item[0]))
        ],
    }


def describe_status(found: dict[str, Any]) -> str:
    """Return the same as a table."""
    if not found["models"]:
        return "nobody serves anything here"
    lines = []
    for model in found["models"]:
        bits = "" if model["bits"] is None else f", {model['bits']} bits"
        holes = describe_blocks(model["holes"])
        lines += [
            f"{model['model']} ({model['dtype']}{bits}), {model['blocks']} blocks: "
            + (f"nobody serves {holes}" if model["holes"] else f"{model['tokens_per_second']:.1f} tokens/s"),
            f"{'blocks':>9}  {'peer':<10}{'state':<9}{'tokens/s':>9}{'cache left':>14}{'sessions':>9}",
        ]
        for each in model["servers"]:
            room = f"{each['cache_bytes_left'] / 1e6:.0f}/{each['cache_bytes'] / 1e6:.0f} MB"
            span = f"{each['first']}:{each['last']}"
            lines.append(
                f"{span:>9}  …{each['peer'][-8:]:<9}{each['state']:<9}{each['tokens_per_second']:9.1f}"
                f"{room:>14}{each['sessions']:9}"
            )
        lines.append("")
    return "\n".join(lines[:-1])

"""A language engine whose target is served by a swarm."""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import Engine, make_draft, pack_model
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.memory.packing import read_rest
from t2iprobe.llm.models import DEFAULT_MODEL, find_language_model, load_tokenizer, load_without_layers
from t2iprobe.llm.swarm.blocks import Ends, load_blocks
from t2iprobe.llm.swarm.decoder import SwarmDecoder
from t2iprobe.llm.swarm.registry import ModelKey, find_models
from t2iprobe.llm.swarm.session import Counters, Settings, Swarm
from t2iprobe.llm.swarm.taught import load_taught, save_taught
from t2iprobe.llm.swarm.training import LocalChain, SwarmChain
from t2iprobe.llm.swarm.transport import Node
from t2iprobe.llm.swarm.tuning import Tuning, read_examples, tune

__all__ = ["BUDGET", "describe_swarm", "load_swarm_engine", "tune_soft_prompt"]

# Guesses a tree where none is asked for: over a network a pass costs its round trips, whatever its rows.
BUDGET = 64


def load_swarm_engine(
    model: str,
    peers: Sequence[str],
    draft: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    bits: int | None = None,
    allowed: Collection[str] | None = None,
    settings: Settings | None = None,
    soft_prompt: Path | None = None,
) -> Engine:
    """Load a target whose embedding and head are here and whose blocks are served at `peers`, and its draft.

    `bits` are those that the servers hold their weights in, None for whatever is served; `allowed` the ids of
    the only peers that are asked; `soft_prompt` a file of `llm swarm tune`. Raises UserError where nobody
    answers, or the model is not served.
    """
    files = find_language_model(model)
    packed = pack_model(files, dtype, device)
    whole = load_without_layers(files, read_rest(packed), dtype=dtype, device=device)
    node = Node(peers, allowed=allowed)
    try:
        key = _choose_key(node, ModelKey.of(files, packed, bits), bits)
        swarm = Swarm(node, key, settings)
        taught = None if soft_prompt is None else load_taught(soft_prompt, key)
        engine = Engine(files, load_tokenizer(files), SwarmDecoder(whole, swarm, taught), packed=packed)
    except BaseException:
        node.close()
        raise
    engine.call_at_end(node.close)
    try:
        engine.draft_name = draft or ("student" if model == DEFAULT_MODEL else "lookup")
        engine.draft = make_draft(engine.draft_name, engine)
    except BaseException:
        engine.close()
        raise
    return engine


def tune_soft_prompt(
    model: str,
    examples: Path,
    out: Path,
    peers: Sequence[str] = (),
    *,
    how: Tuning | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    bits: int | None = None,
    allowed: Collection[str] | None = None,
    settings: Settings | None = None,
    show: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Teach from a file of examples, through the swarm at `peers`; without, in this process.

    Adapters stand where `how` says; else, in a swarm, before each span of the route as it is now. Returns
    what `llm swarm tune --json` prints: losses a token before training and after each epoch. Raises UserError
    for examples that cannot be read, and what `load_swarm_engine` raises.
    """
    how = how or Tuning()
    files = find_language_model(model)
    rows = read_examples(examples, load_tokenizer(files))
    packed = pack_model(files, dtype, device)
    whole = load_without_layers(files, read_rest(packed), dtype=dtype, device=device)
    ends = Ends(whole, Decoder(whole).windows)
    key = ModelKey.of(files, packed, bits)
    began = time.perf_counter()
    with ExitStack() as stack:
        chain: LocalChain | SwarmChain
        if peers:
            node = stack.enter_context(Node(peers, allowed=allowed))
            key = _choose_key(node, key, bits)
            chain = SwarmChain(Swarm(node, key, settings))
            stack.callback(chain.close)
            if how.rank and not how.borders:
                how = replace(how, borders=chain.begins())
        else:
            blocks = load_blocks(files, 0, key.blocks, dtype=dtype, device=device, bits=bits)
            stack.callback(blocks.close)
            chain = LocalChain(blocks)
        prompt, adapters, history = tune(ends, chain, rows, how, show)
        network = asdict(chain.swarm.counters) if isinstance(chain, SwarmChain) else {}
    found = {
        "out": str(out),
        "model": key.name,
        "examples": len(rows),
        "rows": how.rows,
        "rank": how.rank,
        "borders": [] if adapters is None else list(adapters.borders),
        "losses": history,
        "held_out_loss_before": history[0]["held_out_loss"],
        "held_out_loss_after": history[-1]["held_out_loss"],
        "seconds": time.perf_counter() - began,
        **network,
    }
    save_taught(out, prompt, adapters, key, {"examples": len(rows), "losses": history})
    return found


def _choose_key(node: Node, key: ModelKey, bits: int | None) -> ModelKey:
    """Return the key under which a model is served: with these weights, in this dtype."""
    served = find_models(node)
    if any(str(each) == str(key) for each in served):
        return key
    same = [each for each in served if each.hash == key.hash]
    fitting = [each for each in same if each.dtype == key.dtype]
    if bits is None and len(fitting) == 1:
        return ModelKey(key.hash, key.dtype, fitting[0].bits, key.blocks, key.name)
    if same:
        kinds = ", ".join(f"{each.dtype} in {each.bits or 'all'} bits" for each in same)
        raise UserError(f"{key.name} is served as {kinds}: ask for one of these with --dtype and --bits")
    others = ", ".join(sorted({each.name for each in served})) or "nothing"
    raise UserError(f"{key.name} is not served there, but {others}: t2iprobe llm swarm join {key.name}")


def describe_swarm(engine: Engine) -> dict[str, Any]:
    """Return what went over the network since the last call: what `llm generate --swarm --json` adds."""
    target = engine.target
    assert isinstance(target, SwarmDecoder)
    counted, target.swarm.counters = target.swarm.counters, Counters()
    return asdict(counted)

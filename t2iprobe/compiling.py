"""Networks that torch compiles, on a CPU for several threads at once."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from t2iprobe.attention import find_denoisers
from t2iprobe.cpu_layers import lane
from t2iprobe.pipelines import Pipeline

if TYPE_CHECKING:
    import torch


def compile_networks(pipeline: Pipeline) -> None:
    """Compile a pipeline's denoisers in place, at their first call; on a GPU its decoder, too.

    On a CPU the decoder's large maps are faster layer by layer, weights may not change any more, and whatever
    number of pictures a batch has, one compiled network serves it. Not twice for one pipeline.
    """
    for network in _compiled_networks(pipeline):
        network.plain_forward = network.__dict__.get("forward")  # of offloaded networks
        network.forward = _compile(network)


def stop_compiling(pipeline: Pipeline, error: BaseException) -> None:
    """Let a pipeline's networks run as they were before `compile_networks`, and warn once why."""
    for network in _compiled_networks(pipeline):
        del network.forward
        if network.plain_forward is not None:
            network.forward = network.plain_forward
    lines = str(error).strip().splitlines() or [type(error).__name__]
    warnings.warn(
        f"torch.compile does not work here, drawing goes on without: {lines[0][:200]}", stacklevel=2
    )


def _compiled_networks(pipeline: Pipeline) -> "list[Any]":
    networks: list[Any] = [network for _, network in find_denoisers(pipeline)]
    decoder = getattr(getattr(pipeline, "vae", None), "decoder", None)
    if decoder is not None and not _is_on_cpu(decoder):
        networks.append(decoder)
    return networks


def _is_on_cpu(network: "torch.nn.Module") -> bool:
    return next(network.parameters()).device.type == "cpu"


def _compile(network: "torch.nn.Module") -> Any:
    """Return a network's compiled forward. What its hooks do stays outside."""
    import torch
    import torch._inductor.config

    # Of diffusers' own code, which is right without its cache.
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    compiled = torch.compile(network.forward)
    if not _is_on_cpu(network):
        return compiled

    turns = _Turns()
    known: set[Any] = set()

    def forward(*given: Any, **named: Any) -> Any:
        tensors = [value for value in (*given, *named.values()) if isinstance(value, torch.Tensor)]
        for value in (*tensors, *(lane.projections or ())):
            if value.ndim > 1:
                torch._dynamo.maybe_mark_dynamic(value, 0)
        shapes = tuple((value.shape[1:], value.shape[:1] == (1,)) for value in tensors)
        kind = shapes, lane.halves_agree, lane.projections is None
        # Weights are constants there, which oneDNN may lay out as it likes. The setting holds for the thread.
        with turns.take(alone=kind not in known), torch._inductor.config.patch(freezing=True):
            made = compiled(*given, **named)
        known.add(kind)
        return made

    return forward


class _Turns:
    """Let threads run what is compiled at the same time, but whoever compiles alone.

    Else torch does not know again, in one thread, what it compiles in another, and compiles it once more.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0  # -1: one, alone
        self._asking = 0  # to be alone

    @contextmanager
    def take(self, *, alone: bool) -> "Iterator[None]":
        with self._changed:
            self._asking += alone
            self._changed.wait_for(
                lambda: self._running == 0 if alone else self._running >= 0 and not self._asking
            )
            self._asking -= alone
            self._running += -1 if alone else 1
        try:
            yield
        finally:
            with self._changed:
                self._running += 1 if alone else -1
                self._changed.notify_all()

"""Real servers of a toy model, each a process of its own, on the loopback."""

import contextlib
import os
import queue
import resource
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import real_command

# Processes are forked from the one that real commands are forked from.
real_command._LOADED += ["t2iprobe.llm.swarm.client", "t2iprobe.llm.swarm.joining", "hivemind.dht.node"]


@dataclass
class Server:
    """A server's process: its address, and the signals that may hit it."""

    process: Any
    address: str
    daemon: int
    events: Any = field(repr=False, default=None)

    @property
    def peer(self) -> str:
        return self.address.rpartition("/")[2]

    def resident_bytes(self) -> int:
        """What the process has in memory now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.join()

    def end(self) -> None:
        """Be it killed, stopped or well: it goes, and its daemon with it."""
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGCONT)
            self.process.kill()
        self.process.join(10)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.daemon, signal.SIGKILL)


class Servers:
    """Starts servers and ends them all."""

    def __init__(self, model: Path, cache: Path) -> None:
        self.model, self.cache = model, cache
        self.all: list[Server] = []

    def start(self, blocks: str | None, *peers: str, fault: str | None = None, **how: Any) -> Server:
        """Start one server and wait until others find it; `fault` is one of `faulty_server.FAULTS`."""
        return self.start_many([blocks], peers, fault=fault, **how)[0]

    def start_many(
        self, spans: Sequence[str | None], peers: Sequence[str] = (), fault: str | None = None, **how: Any
    ) -> list[Server]:
        """Start servers at the same time."""
        context = real_command._context()
        started = []
        for blocks in spans:
            told = context.Queue()
            process = context.Process(
                target=_serve, args=(str(self.model), str(self.cache), blocks, tuple(peers), fault, how, told)
            )
            process.start()
            started.append((process, told))
        servers = []
        for process, told in started:
            try:
                address, daemon = told.get(timeout=120)
            except queue.Empty:
                raise AssertionError("the server does not come up") from None
            servers.append(Server(process, address, daemon, told))
        self.all += servers
        return servers

    def end(self) -> None:
        for server in self.all:
            server.end()


def _serve(
    model: str, cache: str, blocks: str | None, peers: tuple[str, ...], fault: str | None, how: Any, told: Any
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = cache
    from faulty_server import FAULTS

    from t2iprobe.llm.swarm.joining import Joining, join

    def ready(node: Any, server: Any) -> None:
        told.put((node.address, node._p2p._child.pid))

    defaults = {"dtype": "float64", "period_seconds": 2.0, "balance_seconds": 1.0}
    make = {} if fault is None else {"make_server": FAULTS[fault]}
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    join(model, Joining(blocks=blocks, peers=peers, **(defaults | how)), ready=ready, stop=stop, **make)


def wait_until(happened: Any, seconds: float = 30.0) -> None:
    """Wait for something that happens elsewhere."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)

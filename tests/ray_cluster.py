"""A real Ray cluster of this machine's processes: a head, and machines that join; own ports and folder."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil


class RayCluster:
    """Several Ray nodes as processes.

    `address` is what a driver is given, `environment` what it needs: the cluster's token, as Ray has it by
    default.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._gcs, self._client = _free_port(), _free_port()
        self.address = f"ray://127.0.0.1:{self._client}"
        token = Path(folder, "token")
        token.write_text(secrets.token_hex(32))
        self.environment = {"RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1"}

    def start_head(self, cores: int) -> None:
        """Start the head, and wait until its clients' port answers."""
        self._start(
            *("--head", f"--port={self._gcs}", f"--ray-client-server-port={self._client}"),
            *("--include-dashboard=false", f"--temp-dir={self._folder}", f"--num-cpus={cores}"),
        )
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self._client), 1).close()
                return
            assert self._nodes[0].poll() is None, "the head ended"
            assert time.monotonic() < end, "the head does not answer"
            time.sleep(0.2)

    def join(self, cores: int) -> None:
        """Add a machine."""
        self._start(f"--address=127.0.0.1:{self._gcs}", f"--num-cpus={cores}")

    def _start(self, *words: str) -> None:
        ray = Path(sys.executable).with_name("ray")
        command = [
            str(ray), "start", "--block", "--disable-usage-stats", "--object-store-memory=100000000", *words
        ]  # fmt: skip
        log = open(Path(self._folder, f"node{len(self._nodes)}.log"), "wb")  # noqa: SIM115
        # A machine that joins shows the token only if it is told to.
        environment = os.environ | self.environment | {"RAY_AUTH_MODE": "token"}
        self._nodes.append(
            subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        )

    def stop(self) -> None:
        """End every process that belongs to the cluster, however it was started."""
        mine = [
            process
            for process in psutil.process_iter(["cmdline", "environ"])
            if any(self._folder in word for word in process.info["cmdline"] or ())
        ]
        for node in self._nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                mine += psutil.Process(node.pid).children(recursive=True)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
        for process in mine:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for node in self._nodes:
            node.wait()


@contextlib.contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: Unix sockets lie in it
    cluster = RayCluster(folder)
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def start_python(words: list[str], log: Path, **environment: str) -> subprocess.Popen[str]:
    """Start Python with these words; it writes LOG.out and LOG.err."""
    with open(f"{log}.out", "w") as out, open(f"{log}.err", "w") as err:
        given = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"} | environment
        return subprocess.Popen([sys.executable, *words], stdout=out, stderr=err, text=True, env=given)


def wait_until(happened: Callable[[], Any], process: subprocess.Popen[str], log: Path) -> Any:
    """Return what `happened` returns, once that is true; the process must live until then."""
    end = time.monotonic() + 200
    while not (found := happened()):
        assert process.poll() is None, Path(f"{log}.err").read_text()
        assert time.monotonic() < end, Path(f"{log}.err").read_text()
        time.sleep(0.05)
    return found


def read_costs(out: Path) -> dict[str, Any]:
    """What the workers of a folder have done so far."""
    path = out / "cluster.json"
    return json.loads(path.read_text()) if path.exists() else {"workers": [], "done": 0}


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]

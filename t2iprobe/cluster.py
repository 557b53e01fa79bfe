"""Work on a Ray cluster that changes while it runs: workers join and die, lost shards are given out again.

The process that calls is the driver: it keeps the list of items, gives each free worker a shard of them and
stores what comes back. Workers hold a loaded model and nothing else: they need no file of the driver's.
"""

import contextlib
import json
import os
import socket
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import t2iprobe
from t2iprobe.errors import UserError
from t2iprobe.storage import explain_full_disk, write_atomically

LOCAL = "local"  # a cluster of this machine alone, started for the call
CONNECT_SECONDS = 10.0  # to hear from an address
LOOK_SECONDS = 2.0  # between two looks at which machines there are
WAIT_SECONDS = 30.0  # for a free place, before a person is told
CORES = 4  # of a worker without a GPU, unless told, or the machines have fewer
TRIES = 3  # workers that may die over one shard, or in a row before they have begun

T = TypeVar("T")
Item = Any
Costs = dict[str, Any]


@dataclass(frozen=True)
class Cluster:
    """Where to work: ``local``, ``ray://HOST:PORT`` or ``auto`` (on its machines); a worker's CPU cores."""

    address: str
    cores: int | None = None


@contextlib.contextmanager
def connected(cluster: Cluster, device: str = "auto") -> Iterator["Crew"]:
    """Connect to a cluster; what was started on it ends with the block.

    With a `device` of "cpu" workers take no GPU, with "cuda" they wait for one; with "auto" they take one
    where the cluster has any. Raises UserError without Ray, and where no cluster answers.
    """
    ray, ours = connect(cluster.address)
    try:
        yield Crew(ray, cluster, device)
    except Exception as error:
        if not (isinstance(error, ConnectionError) or type(error).__module__.startswith("grpc")):
            raise
        raise UserError(  # what Ray's client raises when the other side is gone
            f"lost the Ray cluster at {cluster.address} ({_first_line(error)}): what came back is kept; "
            "the same command continues"
        ) from None
    finally:
        if ours:
            ray.shutdown()


def connect(address: str) -> tuple[Any, bool]:
    """Connect this process to a Ray cluster; returns the ray module, and whether it was not connected yet.

    Raises UserError without Ray, and where no cluster answers.
    """
    if address.startswith("ray://") and _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as Ray does itself for all but its client
    ray = import_ray()
    if ray.is_initialized():
        return ray, False
    _knock(address)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the client's: what it says is in the error
            settings = {
                "address": address,
                "include_dashboard": False if address == LOCAL else None,
                "log_to_driver": False,
                "logging_level": "error",
            }
            try:
                ray.init(**settings)
            except (
                ConnectionAbortedError
            ):  # a busy head takes longer than Ray waits to start our server there
                ray.init(**settings)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise UserError(
            f"no Ray cluster at {address}: {_first_line(error)} (does it run the same versions of Ray and "
            "Python, and is its token here, in ~/.ray/auth_token or RAY_AUTH_TOKEN_PATH?)"
        ) from None
    return ray, True


def import_ray() -> Any:
    """Return the ray module. Raises UserError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # announced, and told on each start
    try:
        import ray
    except ImportError:
        raise UserError("a cluster needs Ray: pip install t2iprobe[cluster]") from None
    return ray


def _has_token() -> bool:
    """Whether a token for Ray clusters lies where Ray looks for one."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")
    return "RAY_AUTH_TOKEN" in os.environ or Path(given).is_file()


def _knock(address: str) -> None:
    """Raise UserError where nothing listens at an address: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in (LOCAL, "auto"):
        return
    if not host or not port.isdecimal():
        raise UserError(f"--cluster takes local or ray://HOST:PORT, not {address!r}")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster at {address} ({error}): start one with `ray start --head`, whose clients' port "
            "is 10001"
        ) from None


def _first_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


@dataclass
class Member:
    """A worker of the crew: what it is doing, and what it has cost."""

    handle: Any
    reference: Any = None  # of what it is doing
    items: list[Item] = field(default_factory=list)
    state: str = "starting"
    node: str = ""
    pid: int = 0
    device: str = ""
    done: int = 0
    seconds: float = 0.0  # of shards that came back
    loading_seconds: float = 0.0
    lost: int = 0

    def describe(self) -> Costs:
        rate = self.done / self.seconds if self.done else None
        found = {name: getattr(self, name) for name in ("node", "pid", "device", "state", "done", "lost")}
        seconds = {name: round(getattr(self, name), 3) for name in ("seconds", "loading_seconds")}
        return {**found, **seconds, "per_second": rate}


class Crew:
    """The workers of one connection, and the shards they are given."""

    def __init__(self, ray: Any, cluster: Cluster, device: str = "auto") -> None:
        self._ray, self.address = ray, cluster.address
        nodes = self._nodes()
        self._gpu = device.startswith("cuda") or (
            device == "auto" and any(node.get("GPU", 0) >= 1 for node in nodes)
        )
        least = min((int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1), default=CORES)
        self._cores = cluster.cores or (1 if self._gpu else min(CORES, least))
        self._needs = {"num_cpus": self._cores, "num_gpus": 1 if self._gpu else 0}
        self._members: list[Member] = []
        self._waiting: deque[Item] = deque()
        self._tries: Counter[Item] = Counter()
        self._failed_starts = 0
        self._looked = 0.0
        self._room = 1
        self._done = self._given = 0

    def ask(self, question: Callable[[], T], count: int = 1) -> list[T]:
        """Return what `question` says where a worker would be; it is asked in so many places at once."""
        # A process of its own: what it loads ends with it, and it takes as long to start as a worker.
        task = self._ray.remote(**self._needs, max_retries=TRIES, max_calls=1)(_answer)
        try:
            answers = [task.remote(question) for _ in range(count)]
            if not self._ray.wait(answers, num_returns=1, timeout=WAIT_SECONDS)[0]:
                what = "GPU" if self._gpu else f"{self._cores} cores"
                print(f"waiting for a machine of the cluster with a free {what}", file=sys.stderr)
            return [_open(answer) for answer in self._ray.get(answers)]
        except Exception as error:
            if "No module named 't2iprobe" not in str(error):
                raise
            raise UserError(
                "the machines of the cluster lack this package: "
                f"pip install t2iprobe=={t2iprobe.__version__} on each"
            ) from None

    def work(
        self,
        make: Callable[[], Callable[[Any], T]],
        rounds: Iterable[Sequence[Item]],
        store: Callable[[T], None],
        *,
        size: Callable[[int, int, float | None], int],
        pack: Callable[[list[Item]], Any] = list,
        show: Callable[[Costs], None] | None = None,
    ) -> Costs:
        """Have all items worked on; returns what that cost.

        Args:
            make: called on each new worker; returns what does a packed shard there.
            rounds: of items to be done, hashable; each is asked for when all before it is stored.
            store: called here with each shard's result.
            size: (items left, places for workers, items per second of the worker) → items of its next shard.
            pack: a shard's items → what is sent to the worker.
            show: called about every second with the costs so far.

        A shard whose worker died is given out again. Raises UserError where a worker raised one, and where
        three died over the same shard.
        """
        began, shown, total = time.monotonic(), 0.0, 0
        try:
            for items in rounds:
                self._waiting.extend(items)
                total += len(items)
                while self._waiting or any(member.items for member in self._members):
                    self._hire(make)
                    self._give(size, pack)
                    self._collect(store)
                    if show is not None and time.monotonic() - shown > 1:
                        show(self._costs(total, began))
                        shown = time.monotonic()
        finally:
            self._dismiss()
        costs = self._costs(total, began)
        if show is not None:
            show(costs)
        return costs

    def count_free(self) -> int:
        """Return for how many workers there is room now, beside whoever else works there; at least one."""
        what, each = ("GPU", 1) if self._gpu else ("CPU", self._cores)
        return max(1, min(self._count_places(), int(self._ray.available_resources().get(what, 0) // each)))

    def _count_places(self) -> int:
        what, each = ("GPU", 1) if self._gpu else ("CPU", self._cores)
        return sum(int(node.get(what, 0) // each) for node in self._nodes())

    def _nodes(self) -> list[dict[str, float]]:
        """Return the resources of each machine that lives."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _hire(self, make: Callable) -> None:
        """Start workers for all places, and one more: it waits for a machine that joins."""
        alive = [member for member in self._members if member.state != "dead"]
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._room = self._count_places()
            self._looked = time.monotonic()
        shards = len(self._waiting) + sum(1 for member in alive if member.items)
        for _ in range(min(self._room + 1, shards) - len(alive)):
            handle = self._ray.remote(**self._needs)(_Worker).remote()
            self._members.append(Member(handle, handle.begin.remote(make)))

    def _give(self, size: Callable, pack: Callable) -> None:
        for member in self._members:
            if member.state == "idle" and self._waiting:
                rate = member.done / member.seconds if member.done else None
                most = max(1, size(len(self._waiting), max(1, self._room), rate))
                member.items = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
                member.reference = member.handle.do.remote(pack(member.items))
                member.state = "busy"
                self._given += len(member.items)

    def _collect(self, store: Callable) -> None:
        by_reference = {m.reference: m for m in self._members if m.reference is not None}
        if not by_reference:
            time.sleep(0.2)
            return
        ready, _ = self._ray.wait(list(by_reference), num_returns=1, timeout=0.5)
        for reference in ready:
            member = by_reference[reference]
            try:
                answer, seconds = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError:
                raise  # our bug, with the worker's traceback
            except self._ray.exceptions.RayError as error:
                self._bury(member, error)
                continue
            found = _open(answer)
            member.reference = None
            if member.state == "starting":
                member.loading_seconds = seconds
                member.node, member.pid, member.device = found
                self._failed_starts = 0
            else:
                store(found)
                member.seconds += seconds
                member.done += len(member.items)
                self._done += len(member.items)
                member.items = []
            member.state = "idle"

    def _bury(self, member: Member, error: Exception) -> None:
        """Let a dead worker go, and put its shard before everything that waits."""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if not member.items:
            self._failed_starts += 1
            if self._failed_starts >= TRIES:
                raise UserError(f"{TRIES} workers in a row died while they loaded the model ({reason})")
        for item in reversed(member.items):
            self._waiting.appendleft(item)
            self._tries[item] += 1
            if self._tries[item] >= TRIES:
                raise UserError(
                    f"{TRIES} workers died over the same shard, which begins with {member.items[0]} "
                    f"({reason}): what came back is kept"
                )
        member.lost += len(member.items)
        member.handle, member.reference, member.items, member.state = None, None, [], "dead"

    def _dismiss(self) -> None:
        for member in self._members:
            if member.handle is not None:
                with contextlib.suppress(Exception):  # the cluster may be gone; what is on it ends with us
                    self._ray.kill(member.handle)
                member.handle = member.reference = None
            if member.state != "dead":
                member.state = "left"

    def _costs(self, total: int, began: float) -> Costs:
        seconds = time.monotonic() - began
        known = [member for member in self._members if member.pid]
        return {
            "address": self.address,
            "done": self._done,
            "of": total,
            "given": self._given,
            "lost": sum(member.lost for member in self._members),
            "seconds": round(seconds, 3),
            "per_second": self._done / seconds if self._done else None,
            "waiting": sum(1 for member in self._members if member.state == "starting"),
            "workers": [member.describe() for member in known],
        }


class _Worker:
    """What runs on a machine of the cluster, a process of its own."""

    def begin(self, make: Callable[[], Callable]) -> tuple[tuple[bool, Any], float]:
        return self._time(lambda: self._prepare(make))

    def _prepare(self, make: Callable[[], Callable]) -> tuple[str, int, str]:
        self._work = make()
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return socket.gethostname(), os.getpid(), f"cuda:{device}" if device else "cpu"

    def do(self, shard: Any) -> tuple[tuple[bool, Any], float]:
        return self._time(lambda: self._work(shard))

    def _time(self, call: Callable[[], Any]) -> tuple[tuple[bool, Any], float]:
        began = time.monotonic()
        answer = _answer(call)
        return answer, time.monotonic() - began


def _answer(question: Callable[[], Any]) -> tuple[bool, Any]:
    """Call, and return a mistake of the user's as a value: Ray would wrap it into a traceback."""
    try:
        return True, question()
    except UserError as error:
        return False, f"{error} (on {socket.gethostname()})"


def _open(answer: tuple[bool, Any]) -> Any:
    good, found = answer
    if not good:
        raise UserError(found)
    return found


def write_costs(folder: Path, costs: Costs) -> None:
    """Write ``folder/cluster.json``, which tells while the work goes on what it has cost so far."""
    with explain_full_disk(folder):
        write_atomically(folder / "cluster.json", json.dumps(costs, indent=1).encode())


def describe_costs(costs: Costs, unit: str) -> list[str]:
    """Return lines that tell people what the workers did and cost."""
    rate = f", {costs['per_second']:.2f} a second" if costs["per_second"] else ""
    lost = f"; {costs['lost']} in the shards of dead workers were given out again" if costs["lost"] else ""
    lines = [f"{costs['done']} of {costs['of']} {unit} in {costs['seconds']:.0f} s{rate}{lost}"]
    for worker in costs["workers"]:
        speed = f", {worker['per_second']:.2f} a second" if worker["per_second"] else ""
        lines.append(
            f"  {worker['node']} {worker['device']}, process {worker['pid']} ({worker['state']}): "
            f"{worker['done']} {unit}, {worker['seconds']:.0f} s{speed}"
        )
    if costs["waiting"] and not costs["workers"]:
        lines.append("  no worker yet: waiting for a free place")
    return lines


@contextlib.contextmanager
def costs_display(unit: str) -> Iterator[Callable[[Costs], None]]:
    """Yield a function that shows the costs in one place, on a terminal only, on stderr."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda costs: None
        return
    with Live(console=console, transient=True, refresh_per_second=2) as live:
        yield lambda costs: live.update("\n".join(describe_costs(costs, unit)))

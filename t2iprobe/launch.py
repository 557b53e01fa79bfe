"""Processes that `accelerate launch` (or torchrun) started together: who each is, and waiting for the others.

They share a run directory, on one machine or through a shared file system; nothing else travels between them
than who is there and who is done.
"""

import json
import os
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from t2iprobe.errors import UserError

JOIN_SECONDS = 300  # for all to come
_WAIT = timedelta(days=30)  # for the slowest share: a process that dies is noticed at once, by its connection
_LAUNCHERS = ("launch", "launch.py", "accelerate-launch", "accelerate.commands.launch")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")


class Launch:
    """This process among those of a launch: `index` of `count`, as in ``--shard index/count``."""

    def __init__(self, index: int, count: int, store: Any) -> None:
        self.index, self.count, self._store = index, count, store

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and reports."""
        return self.index == 0

    def wait(self) -> None:
        """Return when all processes have come here. Raises UserError where one of them died."""
        import torch.distributed as dist

        work: Any = dist.barrier(async_op=True)
        try:
            while not work.is_completed():
                time.sleep(0.05)  # and not in the library, which would not hear a signal
            work.wait()
        except RuntimeError:
            raise UserError(
                "another process of the launch ended before its work: what was done so far is kept; the same "
                "command continues, with any number of processes"
            ) from None

    def gather(self, found: Any) -> list[Any]:
        """Return what each process found, in their order: anything that JSON holds."""
        self._store.set(f"found{self.index}", json.dumps(found))
        return [json.loads(self._store.get(f"found{index}")) for index in range(self.count)]

    def agree_on(self, folder: Path) -> None:
        """Wait until the first process has made `folder`. Raises UserError where another sees another one."""
        token = folder / ".launch"
        if self.first:
            token.write_text(word := uuid.uuid4().hex)
            self._store.set("folder", word)
        self.wait()
        if not token.exists() or token.read_bytes() != self._store.get("folder"):
            raise UserError(
                f"{folder} is not the same folder for all processes of the launch: give --out one on a file "
                "system that all machines share"
            )
        self.wait()
        if self.first:
            token.unlink()

    def is_first_to_tell(self) -> bool:
        """Whether no other process has told of the launch's end yet."""
        try:
            return self._store.add("told", 1) == 1
        except RuntimeError:  # the launcher, which keeps the store, is gone
            return self.first


_joined: Launch | None = None


def join_launch() -> Launch | None:
    """Meet the other processes of the launch; None where this process was started alone.

    Each process is given one GPU of its machine, where there are some. Raises UserError where the others do
    not come within five minutes.
    """
    global _joined
    if _joined is None and _was_started_alone_by_accelerate():
        _start_all()
    if _joined is None and int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
        _take_device(int(os.environ.get("LOCAL_RANK", 0)))
        _joined = _meet()
    return _joined


def seconds_since_start() -> float:
    """Return how long ago this process was started, or the launcher that it came from."""
    import psutil

    process = psutil.Process()
    began = process.create_time()
    for parent in process.parents() if _joined is not None else []:
        words = {Path(word).name for word in parent.cmdline()}
        if not words & {*_LAUNCHERS, "torchrun", "torch.distributed.run"}:
            break
        began = parent.create_time()
    return time.time() - began


def may_tell() -> bool:
    """Whether this process is the one to tell a person what went wrong: one message a launch is enough."""
    if _joined is not None:
        return _joined.is_first_to_tell()
    return int(os.environ.get("RANK", 0)) == 0


def _meet() -> Launch:
    import torch.distributed as dist

    try:
        seconds = timedelta(seconds=JOIN_SECONDS)
        store, index, count = next(iter(dist.rendezvous("env://", timeout=seconds)))
        dist.init_process_group("gloo", store=store, rank=index, world_size=count, timeout=_WAIT)
    except (RuntimeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"the processes of the launch did not meet ({reason}): start them again") from None
    return Launch(index, count, dist.PrefixStore("t2iprobe", store))


def _take_device(number: int) -> None:
    """Let this process see one GPU only, before anything looks for one."""
    import torch

    count = torch.cuda.device_count()
    if count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(each) for each in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number % count]


def _was_started_alone_by_accelerate() -> bool:
    """Whether accelerate was asked for several processes and started one: it does so below two GPUs."""
    names = os.environ.keys()
    return {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= names and not names & set(_RANKS)


def _start_all() -> None:
    """Replace this process by the launcher of as many as accelerate was asked for, which its words tell."""
    import psutil
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    parent = psutil.Process(os.getppid())
    words = parent.cmdline()
    begin = next((number for number, word in enumerate(words) if Path(word).name in _LAUNCHERS), None)
    if begin is None:
        return
    asked = launch_command_parser().parse_args(words[begin + 1 :])
    file = asked.config_file or default_config_file
    stored = load_config_from_file(file) if os.path.isfile(file) else None

    def find(name: str, otherwise: Any) -> Any:
        given = getattr(asked, name)
        given = getattr(stored, name, None) if given is None else given
        return otherwise if given is None else given

    machines = int(find("num_machines", 1))
    here = max(1, int(find("num_processes", 1)) // machines)
    if here * machines < 2 or asked.no_python:
        return
    if asked.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in parent.environ():
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // here))
    place = ["--standalone"]
    if machines > 1:
        place = ["--nnodes", str(machines), "--node_rank", str(find("machine_rank", 0))]
        place += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    module = ["-m"] if asked.module else []
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(here), *place]
    os.execv(sys.executable, [*run, *module, asked.training_script, *asked.training_script_args])

"""Runs of throughput batches with small blocks, for a process of its own, too.

Not in a test module: what another process imports must not depend on which package is called `tests` there.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from t2iprobe.llm.memory.placement import Placement, Shares
from t2iprobe.llm.throughput import write_file

NEW = 9
HALF = Shares(0.5, 0, 0.5)
PLACEMENT = Placement(2, 2, HALF, HALF, HALF)


def run(prompts: Path, out: Path, target: Path, **more: Any) -> dict[str, Any]:
    options = {"block": PLACEMENT, "dtype": "float64", "max_new_tokens": NEW} | more
    return write_file(prompts, out, model=str(target), **options)


def write_slowly(prompts: Path, out: Path, target: Path) -> None:
    # Slow enough to be killed between any two blocks.
    run(prompts, out, target, block=Placement(4, 2, HALF, HALF, HALF), show=lambda *_: time.sleep(0.05))


def die_in_a_line(prompts: Path, out: Path, target: Path) -> None:
    """Be killed behind some blocks, with the last line half on the disk."""

    def show(done: int, _: int) -> None:
        if done >= 8:
            os.truncate(out, out.stat().st_size - 7)
            os.kill(os.getpid(), signal.SIGKILL)

    run(prompts, out, target, show=show)

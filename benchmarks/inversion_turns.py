"""Turns of benchmarks/inversion.py: arms in processes of their own, whose clocks run in their turns only."""

from __future__ import annotations

import heapq
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from subprocess import PIPE

import torch

TOGETHER = 8  # concepts in a pass of (d), our default
REPORT_SECONDS = 30.0


@dataclass
class Unit:
    """One training of one or several concepts in a pass.

    `seconds` has one entry a pass, the first with all that was done before it; `steps` one a concept.
    """

    arm: str
    seed: int
    names: list[str]
    steps: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def active(self, number: int) -> int:
        """Return how many concepts shared the pass of that number; who waits takes the next free place."""
        places = [0] * TOGETHER  # the pass in which each is free
        count = 0
        for steps in self.steps:
            began = heapq.heappop(places)
            heapq.heappush(places, began + steps)
            count += began <= number < began + steps
        return count


class Clock:
    """Times the passes of an arm, which works in a process of its own and in its turns only.

    Threads of one process would do, but each has its own team of OpenMP threads, which slow each other.
    A turn begins with a line on stdin, its seconds; it ends with a line on stdout, units and passes done.
    """

    def __init__(self) -> None:
        self.finished = 0
        self.running: Unit | None = None
        self._slice = self._turn_began = self._began = 0.0

    def wait(self) -> None:
        """Hand the turn back, and wait for the next."""
        print(self.finished, len(self.running.seconds) if self.running else 0, flush=True)
        line = sys.stdin.readline()
        if not line:
            sys.exit(1)  # whoever gives the turns is gone
        self._slice, self._turn_began = float(line), time.perf_counter()

    def begin(self) -> None:
        """Start the clock of the unit's first pass, once a model is loaded."""
        self._began = time.perf_counter()

    def tick(self) -> None:
        """Note the end of a pass; hand the turn back if it has lasted long enough."""
        assert self.running is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.running.seconds.append(now - self._began)
        if now - self._turn_began > self._slice:
            self.wait()
        self._began = time.perf_counter()


class Arm:
    """An arm at work: `command` trains so many units, `guess` is how many passes one may take."""

    def __init__(self, command: Sequence[str], units: int, guess: int) -> None:
        self.units, self.guess = units, guess
        self.finished = self.passes = 0
        self.over = False
        self._process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True)
        self._hear()

    @property
    def share(self) -> float:
        """How much of its work is done, 0..1."""
        return (self.finished + min(self.passes / self.guess, 0.99)) / self.units

    def _hear(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            self.finished, self.passes = map(int, line.split())
            return
        self.over = True
        if self._process.wait():
            raise RuntimeError(f"an arm ended with exit code {self._process.returncode}: see above")

    def advance(self, seconds: float) -> None:
        """Give it a turn and wait for the end of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        self._hear()

    def stop(self) -> None:
        """End its process, whatever it does."""
        self._process.kill()
        self._process.wait()


def take_turns(arms: Mapping[str, Arm], slice_seconds: float) -> None:
    """Let the arms work in turn, the one that has done the least share of its work next."""
    told = time.monotonic()
    try:
        while active := [arm for arm in arms.values() if not arm.over]:
            min(active, key=lambda arm: arm.share).advance(slice_seconds)
            if time.monotonic() - told > REPORT_SECONDS:
                told = time.monotonic()
                tell("  ".join(f"({letter}) {describe_progress(arm)}" for letter, arm in arms.items()))
    finally:
        for arm in arms.values():
            arm.stop()


def describe_progress(arm: Arm) -> str:
    """Return what an arm has done, in words."""
    passes = f", {arm.passes} steps of the next" if arm.passes else ""
    return f"{arm.finished} of {arm.units}{passes}"


def tell(line: str) -> None:
    """Say something about the progress, where results do not go."""
    print(line, file=sys.stderr, flush=True)

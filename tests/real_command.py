"""The real command in a process of its own, with its exit code and output.

Loading torch and diffusers takes seconds, so the processes are forked from one that has loaded them.
"""

import os
import resource
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple
from unittest import mock

SCRIPTS = Path(__file__).parents[1] / "scripts"
_LOADED = [
    "t2iprobe.cli",
    "t2iprobe.inversion.teaching",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers.models.clip.modeling_clip",
]


class Done(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


class Started:
    """A command that runs."""

    def __init__(
        self,
        words: list[str],
        *,
        file_limit: int | None = None,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._output = tempfile.TemporaryDirectory()
        self._process: BaseProcess = _context().Process(
            target=_run,
            args=(words, self._output.name, file_limit, str(folder or os.getcwd()), dict(environment or {})),
        )
        self._process.start()

    def kill_when(self, happened: Callable[[], bool], number: int = signal.SIGKILL) -> Done:
        """Send a signal as soon as `happened` says so."""
        while not happened():
            assert self._process.is_alive(), self.wait()
            time.sleep(0.001)
        assert self._process.pid
        os.kill(self._process.pid, number)
        return self.wait()

    def wait(self) -> Done:
        """Wait for the end."""
        self._process.join(300)
        code = self._process.exitcode
        assert code is not None
        with self._output:
            return Done(code, *(Path(self._output.name, name).read_text() for name in ("out", "err")))


def _context():
    context = get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    # every look leaves a state, so that a kill finds one
    with mock.patch.dict(os.environ, {"T2IPROBE_STATE_SECONDS": "0", "COLUMNS": "100"}):
        forkserver.ensure_running()
    return context


def _run(
    words: list[str], output: str, file_limit: int | None, folder: str, environment: dict[str, str]
) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.update(environment)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if words[0].endswith(".py"):
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    else:
        from t2iprobe.cli import main

        sys.argv = ["t2iprobe", *words]
        main()


def start(*words: object, **how: object) -> Started:
    """Start ``t2iprobe WORDS``, or where the first word ends in .py that script."""
    return Started([str(word) for word in words], **how)


def call(*words: object, code: int = 0, **how: object) -> Done:
    """Run a command to its end and expect an exit code; with 2, also one line that tells why.

    `file_limit` is the largest file, in bytes, that it may write: for a write the same as a full disk.
    """
    done = start(*words, **how).wait()
    assert done.code == code, done
    if code == 2:
        name = "train_concepts" if str(words[0]).endswith(".py") else "t2iprobe"
        assert done.err.startswith(f"{name}: "), done
        assert done.err.count("\n") == 1, done
        assert done.out == "", done
    return done

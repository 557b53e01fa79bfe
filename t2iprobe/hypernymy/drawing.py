"""Pictures from plan positions: drawn and judged by several threads, stored behind their backs."""

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import numpy as np

from t2iprobe.config import Study
from t2iprobe.devices import count_threads, keep_freed_memory, set_threads
from t2iprobe.hypernymy.sampling import Sampler
from t2iprobe.hypernymy.scoring import Scorer
from t2iprobe.pictures import resize_picture
from t2iprobe.runs import Run

SHARD_PICTURES, SHARD_SECONDS = 32, 10.0  # a shard is written after either: what a kill can cost

Progress = Callable[[int, int], None]  # pictures of this share stored or pending, of how many
Pictures = Sequence[np.ndarray | None]
Judged = tuple[Sequence[int], Pictures, dict[str, np.ndarray]]


def draw(
    run: Run,
    missing: Sequence[int],
    sampler: Sampler,
    scorers: Mapping[str, Scorer],
    study: Study,
    progress: Progress | None = None,
) -> None:
    """Draw, judge and store the pictures at the plan positions `missing`, in any order.

    The sampler's workers draw and judge batches; pictures and shards are written meanwhile. Whatever stops
    it, what is judged by then is stored, up to the first batch that failed.
    """
    pending, done = _Pending(run), 0
    try:
        with closing(_judge(run, missing, sampler, scorers, study)) as batches:
            for positions, pictures, logits in batches:
                pending.add(positions, pictures, logits)
                done += len(positions)
                if progress is not None:
                    progress(done, len(missing))
    finally:
        pending.flush()


def _judge(
    run: Run, missing: Sequence[int], sampler: Sampler, scorers: Mapping[str, Scorer], study: Study
) -> Generator[Judged, None, None]:
    """Yield batches in the order of `missing`: positions, pictures, logits by classifier."""

    def judge(positions: Sequence[int]) -> Judged:
        pictures: Pictures = sampler.sample([run.plan[position] for position in positions])
        if study.resize is not None:
            pictures = [p if p is None else resize_picture(p, study.resize) for p in pictures]
        return positions, pictures, score_pictures(pictures, scorers)

    threads, begin = count_threads(), 0
    under_way: deque[Future[Judged]] = deque()
    keep_freed_memory()
    share = max(1, threads // sampler.workers)
    pool = ThreadPoolExecutor(sampler.workers, initializer=set_threads, initargs=(share,))
    try:
        while begin < len(missing) or under_way:
            # One more than are drawn at once, so that nobody waits while a shard is written.
            while begin < len(missing) and len(under_way) <= sampler.workers:
                size = sampler.sizes.next(len(missing) - begin)
                under_way.append(pool.submit(judge, missing[begin : begin + size]))
                begin += size
            yield under_way.popleft().result()
    finally:
        sampler.stop()
        pool.shutdown(cancel_futures=True)
        sampler.resume()
        set_threads(threads)


def score_pictures(pictures: Pictures, scorers: Mapping[str, Scorer]) -> dict[str, np.ndarray]:
    """Return classifier → logits float32 [n, C], zero where a picture is None."""
    rows = [row for row, picture in enumerate(pictures) if picture is not None]
    readable = [picture for picture in pictures if picture is not None]
    logits = {}
    for name, scorer in scorers.items():
        logits[name] = np.zeros((len(pictures), scorer.classes), np.float32)
        if rows:
            logits[name][rows] = scorer.score(readable)
    return logits


class _Pending:
    """Judged pictures that wait to be stored together: a shard a picture would be many small files."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._clear()

    def _clear(self) -> None:
        self.since = time.monotonic()
        self.positions: list[int] = []
        self.pictures: list[np.ndarray | None] = []
        self.logits: dict[str, list[np.ndarray]] = {}

    def add(self, positions: Sequence[int], pictures: Pictures, logits: dict[str, np.ndarray]) -> None:
        self.positions += positions
        self.pictures += pictures
        for name, values in logits.items():
            self.logits.setdefault(name, []).append(values)
        if len(self.positions) >= SHARD_PICTURES or time.monotonic() - self.since > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.positions:
            logits = {name: np.concatenate(values) for name, values in self.logits.items()}
            self.run.write_shard(self.positions, logits, self.pictures)
        self._clear()

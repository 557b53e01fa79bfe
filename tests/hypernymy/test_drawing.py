"""Drawing by several threads: the same run as by one, whatever the order, the batches, or what stops it."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t2iprobe.config import Study, load_study
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.drawing import draw
from t2iprobe.hypernymy.sampling import DiffusersSampler, Stopped
from t2iprobe.hypernymy.scoring import Scorer, load_scorer
from t2iprobe.hypernymy.study import make_manifest
from t2iprobe.pipelines import place_pipeline
from t2iprobe.runs import Run
from t2iprobe.testing import tiny_pipeline


@pytest.fixture(scope="module")
def scorers() -> dict[str, Scorer]:
    return {"embedded": load_scorer("embedded", device="cpu", dtype="float32")}


@pytest.fixture
def study(tiny_model: Path) -> Study:
    given = {"synsets": "dog,bird,insect", "samples": 4, "keep": "all", "dtype": "float32"}
    return load_study(None, {"model": str(tiny_model), "steps": 2, "guidance": 3.0, **given})


def make_sampler(lanes: int, dtype: str = "float32", **settings: Any) -> DiffusersSampler:
    pipeline = tiny_pipeline()
    place_pipeline(pipeline, "cpu", dtype)
    return DiffusersSampler(pipeline, steps=2, guidance=3.0, dtype=dtype, lanes=lanes, **settings)


def open_run(study: Study, path: Path) -> Run:
    return Run.create(path, make_manifest(study))


def read(run: Run) -> dict[str, bytes]:
    return {str(path.relative_to(run.path)): path.read_bytes() for path in run.path.glob("pictures/*/*.png")}


def test_lanes_any_order_and_several_calls_give_the_same_run(
    study: Study, scorers: dict[str, Scorer], tmp_path: Path
) -> None:
    one, many = open_run(study, tmp_path / "one"), open_run(study, tmp_path / "many")
    draw(one, range(12), make_sampler(1, batch_size=12), scorers, study)
    sampler, done = make_sampler(3, batch_size=2), []
    for positions in ([7, 3, 11], [0], [10, 1, 2, 4, 5, 6, 8, 9]):
        draw(many, positions, sampler, scorers, study, lambda *counts: done.append(counts))

    assert many.complete
    assert many.verify() == []
    assert read(many) == read(one)
    assert len(read(one)) == 12
    for name, logits in one.logits().items():
        assert np.abs(many.logits()[name] - logits).max() < 1e-4
    assert done[-1] == (8, 8)
    assert [of for _, of in done][:2] == [3, 3]


def test_so_many_batches_are_drawn_at_once_as_there_are_lanes(
    study: Study, scorers: dict[str, Scorer], tmp_path: Path
) -> None:
    sampler = make_sampler(3, batch_size=1)
    inside, most, lock = [0], [0], threading.Lock()

    def enter(*_: object) -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.02)

    def leave(*_: object) -> None:
        with lock:
            inside[0] -= 1

    sampler.pipeline.unet.register_forward_pre_hook(enter)
    sampler.pipeline.unet.register_forward_hook(leave)
    threads = torch.get_num_threads()
    draw(open_run(study, tmp_path / "run"), range(12), sampler, scorers, study)

    assert most[0] == 3
    assert torch.get_num_threads() == threads


def test_pictures_are_judged_while_others_are_drawn_where_there_is_one_lane(
    study: Study, tmp_path: Path
) -> None:
    sampler = make_sampler(1, batch_size=2)
    sampler.workers = 2  # as on a GPU
    events: list[str] = []
    sampler.pipeline.unet.register_forward_pre_hook(lambda *_: events.append("draw"))

    class Slow:
        name, classes = "slow", 1000

        def score(self, pictures: Any) -> np.ndarray:
            events.append("judge")
            time.sleep(0.3)
            events.append("judged")
            return np.zeros((len(pictures), 1000), np.float32)

    draw(open_run(study, tmp_path / "run"), range(6), sampler, {"embedded": Slow()}, study)

    first = events.index("judge")
    assert "draw" in events[first : events.index("judged")]


def test_what_is_judged_is_stored_when_a_batch_fails(
    study: Study, scorers: dict[str, Scorer], tmp_path: Path
) -> None:
    run, sampler = open_run(study, tmp_path / "run"), make_sampler(2, batch_size=2)
    drawn, sample = [0], sampler.sample

    def fail(entries: Any) -> Any:
        if entries[0] == run.plan[4]:
            raise UserError("the third batch")
        drawn[0] += 1
        return sample(entries)

    sampler.sample = fail  # type: ignore[method-assign]
    with pytest.raises(UserError, match="the third batch"):
        draw(run, range(12), sampler, scorers, study)

    assert run.done() == {0, 1, 2, 3}
    assert drawn[0] < 5
    sampler.sample = sample  # type: ignore[method-assign]
    draw(run, run.missing(), sampler, scorers, study)
    assert run.complete


def test_a_stopped_run_ends_within_a_step_and_goes_on_later(
    study: Study, scorers: dict[str, Scorer], tmp_path: Path
) -> None:
    run, sampler = open_run(study, tmp_path / "run"), make_sampler(2, batch_size=2)
    sampler.configure(steps=400, guidance=3.0, size=None)

    def interrupt(done: int, of: int) -> None:
        raise KeyboardInterrupt

    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        draw(run, range(12), sampler, scorers, study, interrupt)
    stopped = time.perf_counter() - begin
    assert run.done() == {0, 1}
    begin = time.perf_counter()
    sampler.configure(steps=2, guidance=3.0, size=None)
    draw(run, run.missing(), sampler, scorers, study)
    assert run.complete
    assert stopped > time.perf_counter() - begin  # one batch of 400 steps takes longer than five of 2
    sampler.stop()
    with pytest.raises(Stopped):
        sampler.sample(run.plan[:1])
    sampler.resume()
    assert len(sampler.sample(run.plan[:1])) == 1


def test_embeddings_that_have_no_room_are_made_again(monkeypatch: pytest.MonkeyPatch, study: Study) -> None:
    from t2iprobe.hypernymy import encoding

    plan = Run(Path("."), make_manifest(study)).plan[:3]
    whole = make_sampler(1)
    expected = whole.sample(plan)
    (size,) = {
        part.numel() * 4
        for kept in whole.encoder._embeddings.values()
        for part in kept[:1]
        if part is not None
    }
    monkeypatch.setattr(encoding, "EMBEDDINGS_BYTES", 2 * size)
    small = make_sampler(1)

    first, second = small.sample(plan), small.sample(plan)

    assert len(whole.encoder.known_prompts) == 3
    assert len(small.encoder.known_prompts) == 2
    for again in (first, second):
        assert all(np.array_equal(a, b) for a, b in zip(again, expected, strict=True))


def test_batch_sizes_are_found_while_drawing(
    study: Study, scorers: dict[str, Scorer], tmp_path: Path
) -> None:
    larger = study.model_copy(update={"samples": 16, "keep": "none"})
    run, sampler = open_run(larger, tmp_path / "run"), make_sampler(1, "bfloat16")
    drawn: list[int] = []
    sampler.pipeline.unet.register_forward_pre_hook(lambda _, inputs: drawn.append(len(inputs[0]) // 2))

    draw(run, range(48), sampler, scorers, larger)

    assert run.complete
    assert drawn[::2][0] == 2
    assert max(drawn) > 2
    assert sum(drawn) == 2 * 48

"""What goes wrong in real life, done for real: kills, full disks, damaged files, pictures of nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from full_disk import file_limit
from PIL import Image

from t2iprobe.config import Study, load_study
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.study import run_study
from t2iprobe.runs import Run
from t2iprobe.testing import tiny_pipeline

SETTINGS = {
    "synsets": "dog,bird,n02121808,insect",
    "steps": 2,
    "guidance": 3.0,
    "dtype": "float32",
    "batch_size": 4,
    "keep": "all",
}


def make_study(model: Path, samples: int) -> Study:
    return load_study(None, {"model": str(model), "samples": samples, **SETTINGS})


def start(model: Path, out: Path, samples: int) -> subprocess.Popen[str]:
    """Start the real command in a process of its own."""
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    command = [sys.executable, "-m", "t2iprobe", "hypernymy", "run", "--model", str(model), *settings]
    return subprocess.Popen(
        [*command, "--samples", str(samples), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(process: subprocess.Popen[str], run: Path, signum: int, shards: int) -> str:
    """Send a signal as soon as there are so many shards, and return what the process said on stderr."""
    while len(list((run / "shards").glob("*.npz"))) < shards:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    os.kill(process.pid, signum)
    _, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors
    return errors


def read_pictures(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): Image.open(path).tobytes() for path in out.glob("pictures/*/*.png")}


def test_a_run_that_is_killed_and_stopped_draws_every_picture_once(tiny_model: Path, tmp_path: Path) -> None:
    samples, out = 32, tmp_path / "run"
    killed = start(tiny_model, out, samples)
    stop(killed, out, signal.SIGKILL, shards=1)
    after_kill = len(Run.open(out).done())
    assert killed.returncode == -signal.SIGKILL
    assert 0 < after_kill < 128

    stopped = start(tiny_model, out, samples)
    errors = stop(stopped, out, signal.SIGTERM, shards=2)
    after_stop = len(Run.open(out).done())
    assert stopped.returncode == 130
    assert after_kill < after_stop < 128
    assert f"stopped: {after_stop} of 128 pictures are stored" in errors
    assert "the same command continues" in errors

    counts: list[tuple[int, int]] = []
    run = run_study(make_study(tiny_model, samples), out, progress=lambda done, of: counts.append((done, of)))
    indices = [int(index) for shard in run.shards for index in np.load(shard)["indices"]]
    assert counts[-1] == (128 - after_stop, 128 - after_stop)
    assert sorted(indices) == list(range(128))
    assert run.verify() == []
    assert not list(out.rglob("*.tmp"))
    whole = run_study(make_study(tiny_model, samples), tmp_path / "whole")
    assert read_pictures(out) == read_pictures(whole.path)


def test_a_full_disk_is_told_and_nothing_is_lost(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    kept = read_pictures(run_study(make_study(tiny_model, 1), out).path)

    with file_limit(60_000), pytest.raises(UserError, match="is full") as raised:
        run_study(make_study(tiny_model, 8), out, extend=True)

    assert "run the same command to continue" in str(raised.value)
    assert len(Run.open(out).done()) == 4
    assert not list(out.rglob("*.tmp"))
    run = run_study(make_study(tiny_model, 8), out, extend=True)
    assert run.complete
    assert len(kept) == 4
    assert kept.items() <= read_pictures(out).items()


def test_a_corrupt_shard_is_named_set_aside_and_drawn_again(tiny_model: Path, tmp_path: Path) -> None:
    study, out = make_study(tiny_model, 1), tmp_path / "run"
    run = run_study(study, out)
    before = read_pictures(out)
    shard = run.shards[0]
    shard.write_bytes(shard.read_bytes()[:-100])

    with pytest.raises(UserError, match=f"shard {shard} is corrupt.*--repair"):
        run_study(study, out)
    assert Run.open(out).verify(repair=True) != []
    run_study(study, out)

    assert read_pictures(out) == before
    assert shard.with_name(f"{shard.name}.corrupt").exists()
    assert run.verify() == []


def test_a_model_that_draws_nan_is_told(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.vae.decoder.conv_out.bias.data[:] = float("nan")
    pipeline.save_pretrained(tmp_path / "model")

    with pytest.raises(UserError, match=r"base-0000 of bird\.n\.01 .* holds NaN") as raised:
        run_study(make_study(tmp_path / "model", 1), tmp_path / "run")

    assert "\n" not in str(raised.value)
    assert not Run.open(tmp_path / "run").done()


@pytest.mark.parametrize("damage", ["truncate", "empty", "text"])
def test_a_corrupt_picture_is_named_and_what_came_before_it_is_kept(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "made" / "dog.n.01"
    folder.mkdir(parents=True)
    for index in range(4):
        Image.effect_noise((64, 64), 90).save(folder / f"{index}.png")
    bad = folder / "2.png"
    content = {"truncate": bad.read_bytes()[:1000], "empty": b"", "text": b"<html>not found</html>"}[damage]
    bad.write_bytes(content)

    with pytest.raises(UserError, match=r"cannot read the picture .*2\.png .*--skip-bad"):
        run_study(
            load_study(None, {"model": "folder", "batch_size": 1}), tmp_path / "run", folder=tmp_path / "made"
        )

    assert Run.open(tmp_path / "run").done() == {0, 1}


def test_a_folder_that_is_no_model_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no model_index\.json"):
        run_study(make_study(tmp_path, 1), tmp_path / "run")

    assert not (tmp_path / "run").exists()

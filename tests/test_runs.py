import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t2iprobe.errors import UserError
from t2iprobe.runs import SCHEMA, Run, build_plan, picture_seed

PROMPTS = {"cat.n.01": {"base": "An image of a cat."}, "dog.n.01": {"base": "An image of a dog."}}


def make_manifest(samples: int = 3, prompts: dict = PROMPTS, keep: str = "none", **identity: Any) -> dict:
    return {
        "schema": SCHEMA,
        "configuration": {},
        "inputs": {},
        "identity": {
            "classifiers": {"judge": {"hash": "sha256:0"}},
            "seed": 0,
            "keep": keep,
            "samples": samples,
            "synsets": sorted(prompts),
            **identity,
        },
        "versions": {},
        "created": "2026-01-01T00:00:00+00:00",
        "plan": [{"samples": samples, "prompts": prompts}],
    }


def store(run: Run, positions: list[int], pictures: list | None = None) -> None:
    """Store logits that hold their own plan position."""
    logits = np.repeat(np.array(positions, np.float32)[:, None], 4, axis=1)
    run.write_shard(positions, {"judge": logits}, pictures)


def test_a_seed_is_a_fact_of_the_picture() -> None:
    assert picture_seed(0, "dog.n.01", "base", 0) == 9206206009194831045  # must never change
    seeds = {
        picture_seed(run, synset, template, index)
        for run in range(3)
        for synset in ("dog.n.01", "cat.n.01")
        for template in ("base", "photo")
        for index in range(50)
    }
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_part_of_the_plan_covers_all_synsets() -> None:
    prompts = {
        name: {"base": f"a {name}", "photo": f"photo of {name}"} for name in ("a.n.01", "b.n.01", "c.n.01")
    }

    plan = build_plan([{"samples": 2, "prompts": prompts}], 0)

    assert len(plan) == 12
    assert [entry.synset for entry in plan[:3]] == ["a.n.01", "b.n.01", "c.n.01"]
    assert [entry.index for entry in plan] == [0] * 6 + [1] * 6
    assert len({entry.seed for entry in plan}) == 12


def test_positions_stay_when_a_plan_is_extended() -> None:
    more = {**PROMPTS, "bird.n.01": {"base": "An image of a bird."}}
    old = build_plan([{"samples": 2, "prompts": PROMPTS}], 0)
    new = build_plan([{"samples": 2, "prompts": PROMPTS}, {"samples": 3, "prompts": more}], 0)

    assert new[: len(old)] == old
    assert len(new) == 9


def test_done_is_the_union_of_the_shards(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", make_manifest())
    store(run, [0, 1, 4])
    store(run, [3])

    again = Run.open(tmp_path / "run")

    assert again.missing() == [2, 5]
    assert again.missing((0, 2)) == [2]
    assert again.missing((1, 2)) == [5]
    assert not again.complete


def test_logits_come_back_by_synset_in_plan_order(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", make_manifest())
    store(run, [4, 0, 5])
    store(run, [3, 2, 1])

    logits = run.logits()

    assert logits["cat.n.01"][:, 0].tolist() == [0, 2, 4]
    assert logits["dog.n.01"][:, 0].tolist() == [1, 3, 5]
    assert logits["dog.n.01"].dtype == np.float32
    assert run.complete
    with pytest.raises(UserError, match="did you mean judge"):
        run.logits("judg")


def test_a_skipped_picture_is_done_but_has_no_logits(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", make_manifest(samples=1, keep="all"))
    store(run, [0, 1], [None, np.zeros((8, 8, 3), np.uint8)])

    assert run.complete
    assert list(run.logits()) == ["dog.n.01"]
    assert run.verify() == []


@pytest.mark.parametrize(("keep", "ending"), [("all", "png"), ("thumbnails", "webp"), ("none", None)])
def test_pictures_are_kept_as_asked(tmp_path: Path, keep: str, ending: str | None) -> None:
    run = Run.create(tmp_path / "run", make_manifest(samples=1, keep=keep))
    picture = np.random.default_rng(0).integers(0, 255, (160, 320, 3)).astype(np.uint8)
    store(run, [0, 1], [picture, picture])

    kept = run.pictures("dog.n.01")

    assert [path.name for path in kept] == ([f"base-0000.{ending}"] if ending else [])
    if keep == "all":
        assert (np.asarray(Image.open(kept[0])) == picture).all()
    if keep == "thumbnails":
        assert Image.open(kept[0]).size == (128, 64)


def test_a_changed_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    store(Run.create(tmp_path / "run", make_manifest(steps=20, scheduler={"kind": "ddim", "beta": 1})), [0])

    with pytest.raises(UserError, match=r"steps: 20 → 30; scheduler\.beta: 1 → 2"):
        Run.create(tmp_path / "run", make_manifest(steps=30, scheduler={"kind": "ddim", "beta": 2}))


def test_a_run_that_stored_nothing_may_change_unless_one_writes_it(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", make_manifest(steps=20))
    with run.writing(), pytest.raises(UserError, match="steps: 20 → 30"):
        Run.create(tmp_path / "run", make_manifest(steps=30))

    Run.create(tmp_path / "run", make_manifest(steps=30))

    assert Run.open(tmp_path / "run").manifest["identity"]["steps"] == 30


def test_more_samples_need_extend(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", make_manifest(samples=1))
    store(run, [0, 1])

    with pytest.raises(UserError, match="samples 1 → 2; add --extend"):
        Run.create(tmp_path / "run", make_manifest(samples=2))
    extended = Run.create(tmp_path / "run", make_manifest(samples=2), extend=True)

    assert extended.missing() == [2, 3]
    assert Run.open(tmp_path / "run").missing() == [2, 3]
    with pytest.raises(UserError, match="samples 2 → 1; give another --out"):
        Run.create(tmp_path / "run", make_manifest(samples=1), extend=True)


def test_other_prompts_are_refused_even_with_extend(tmp_path: Path) -> None:
    store(Run.create(tmp_path / "run", make_manifest()), [0])
    other = {**PROMPTS, "dog.n.01": {"base": "Another text."}}

    with pytest.raises(UserError, match=r"other prompts, such as that of dog\.n\.01"):
        Run.create(tmp_path / "run", make_manifest(prompts=other), extend=True)


def test_two_writers_of_a_share_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    Run.create(path, make_manifest())
    code = (
        "import sys; from t2iprobe.runs import Run\n"
        f"with Run.open({str(path)!r}).writing((0, 2)):\n"
        "    print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        run = Run.open(path)
        for share in ((0, 2), (0, 1), (1, 3)):
            with pytest.raises(UserError, match="another process is writing"), run.writing(share):
                pass
        with run.writing((1, 2)):
            pass
        other.communicate("")
    with Run.open(path).writing((0, 1)):
        pass


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        Run.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": "other/1"}')
    with pytest.raises(UserError, match=f"wanted {SCHEMA}"):
        Run.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Run.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file is in the way"):
        Run.create(tmp_path / "file", make_manifest())


def test_verify_finds_what_is_wrong_and_repair_sets_it_aside(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", make_manifest(samples=3, keep="all"))
    picture = np.zeros((8, 8, 3), np.uint8)
    for position in range(5):
        store(run, [position], [picture])
    run.write_shard([5], {"judge": np.full((1, 4), np.nan, np.float32)}, [picture])
    assert run.shards[0].name == "00000000.npz"
    os.truncate(run.shards[1], 100)
    kept = run.pictures("dog.n.01")[1]
    kept.write_bytes(kept.read_bytes()[:40])

    problems = run.verify()

    assert len(problems) == 3
    assert "shards/00000001.npz: corrupt" in problems[0]
    assert problems[1] == "pictures/dog.n.01/base-0001.png: missing or damaged"
    assert problems[2] == "shards/00000005.npz: logits of judge are not finite"
    with pytest.raises(UserError, match=r"00000001\.npz is corrupt.*verify .* --repair"):
        run.missing()
    run.verify(repair=True)
    assert run.missing() == [1, 3, 5]
    assert run.verify() == []


def test_a_picture_in_two_shards_is_a_problem(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", make_manifest())
    store(run, [0, 1])
    store(run, [1, 2])

    assert run.verify() == ["shards/00000001.npz: 1 pictures are in another shard too"]


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", make_manifest())
    store(run, [0, 1, 2, 3, 4, 5])
    content = bytearray(run.shards[0].read_bytes())
    content[len(content) - 400] ^= 1
    run.shards[0].write_bytes(content)

    with pytest.raises(UserError, match="is corrupt"):
        run.logits()


def test_a_manifest_is_written_as_readable_json(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", make_manifest())

    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["identity"]["samples"] == 3

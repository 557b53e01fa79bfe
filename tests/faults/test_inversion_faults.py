"""What goes wrong in a training, done for real: kills, full disks, damaged files, words that cannot be."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from concept_pictures import draw_concept
from real_command import SCRIPTS, call, start
from safetensors.torch import load_file, save_file

from t2iprobe.testing import tiny_pipeline

QUICK = ("--dtype", "float32", "--init", "thing", "--set=grid=0", "--set=evaluate=0", "--set=items=4")


def train(folder: Path, model: Path, out: Path, *more: object, steps: int = 4, token: str = "<cat>") -> list:
    """Return the words of a quick training; what stands in `more` counts last."""
    return [
        *("inversion", "train", folder, "--token", token, "--model", model, "--stop", "budget"),
        *("--max-steps", steps, *QUICK, "--out", out, *more),
    ]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def check_whole(out: Path) -> None:
    """Everything in a folder can be read, and nothing is left of a write that was cut off."""
    for path in out.rglob("*"):
        assert path.suffix != ".tmp", path
        if path.suffix == ".json":
            read_json(path)
        if path.suffix == ".safetensors":
            load_file(path)
        if path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>"), path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_concept(tmp_path_factory.mktemp("concept") / "cat")


@pytest.fixture(scope="module")
def model_with_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose vocabulary has whole words, as finding the nearest one needs."""
    pipeline = tiny_pipeline("sd")
    pipeline.tokenizer.add_tokens(["dog", "cow", "house"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    folder = tmp_path_factory.mktemp("models") / "with_words"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tiny_model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training."""
    out = tmp_path_factory.mktemp("finished") / "out"
    call(*train(pictures, tiny_model, out))
    return out


@pytest.fixture(scope="module")
def killed(tiny_model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that was killed after its first state."""
    out = tmp_path_factory.mktemp("killed") / "out"
    words = train(pictures, tiny_model, out, "--every", 1, steps=500)
    assert start(*words).kill_when((out / "state.safetensors").exists).code == -signal.SIGKILL
    return out


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "out"))


# -- kills -------------------------------------------------------------------------------------------------


def test_a_killed_training_looks_unfinished_and_goes_on(
    killed: Path, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    out = copy(killed, tmp_path)
    assert {path.name for path in out.iterdir() if path.suffix != ".tmp"} == {
        "settings.json",
        "state.safetensors",
    }
    unfinished = call("inversion", "evaluate", out, code=2)
    assert "holds no finished training" in unfinished.err

    words = train(pictures, tiny_model, out, "--every", 1, steps=500)
    before = (out / "state.safetensors").stat().st_mtime_ns
    stopped = start(*words).kill_when(
        lambda: (out / "state.safetensors").stat().st_mtime_ns > before, signal.SIGTERM
    )
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err == f"t2iprobe: stopped: the same command continues from the state in {out}\n"
    check_whole(out)
    assert not (out / "training.json").exists()


def test_a_kill_between_the_outcome_and_its_report_loses_no_report(
    finished: Path, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    out = copy(finished, tmp_path)
    (out / "report.html").unlink()
    (out / "state.safetensors").write_bytes(b"left over")
    outcome = (out / "training.json").read_bytes()

    assert call(*train(pictures, tiny_model, out)).out.startswith("done before: <cat>")

    assert (out / "training.json").read_bytes() == outcome
    assert (out / "report.html").exists()
    assert not (out / "state.safetensors").exists()


@pytest.mark.slow
def test_sigterm_stops_the_installed_command(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [str(word) for word in train(pictures, tiny_model, out, "--every", 1, steps=2000)]
    process = subprocess.Popen(
        [sys.executable, "-m", "t2iprobe", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"T2IPROBE_STATE_SECONDS": "0"},
    )  # fmt: skip
    while not (out / "state.safetensors").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.terminate()
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output) == (130, "")
    assert errors == f"t2iprobe: stopped: the same command continues from the state in {out}\n"


def test_a_killed_script_goes_on_with_what_is_left(tiny_model: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("cat", "cow", "dog")):
        draw_concept(tmp_path / "concepts" / name, seed)
    out = tmp_path / "out"
    settings = [f"--set={pair}" for pair in ("max_steps=20", "every=1", "dtype=float32", "init=thing")]
    settings += [word for word in QUICK if word.startswith("--set")]
    words = [
        *(SCRIPTS / "train_concepts.py", tmp_path / "concepts", "--out", out, "--model", tiny_model),
        *("--stop", "budget", "--together", 2, *settings),
    ]
    third_began = (out / "dog" / "state.safetensors").exists
    assert start(*words).kill_when(third_began).code == -signal.SIGKILL
    first = {name: (out / name / "training.json").stat().st_mtime_ns for name in ("cat", "cow")}
    assert not (out / "dog" / "training.json").exists()

    before = (out / "dog" / "state.safetensors").stat().st_mtime_ns
    stopped = start(*words).kill_when(
        lambda: (out / "dog" / "state.safetensors").stat().st_mtime_ns > before, signal.SIGTERM
    )
    assert (stopped.code, stopped.err) == (130, "train_concepts: stopped: the same command continues\n")

    done = json.loads(call(*words, "--json").out)
    assert {name: found["steps"] for name, found in done.items()} == {"cat": 20, "cow": 20, "dog": 20}
    assert {name: (out / name / "training.json").stat().st_mtime_ns for name in first} == first
    check_whole(out)


# -- disks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "limit"),
    [
        ("textual-inversion", 600),  # settings.json
        ("textual-inversion", 2500),  # the state
        ("textual-inversion", 20_000),  # the report
        ("dreambooth-lora", 4000),  # the adapter
        ("custom-diffusion", 4000),  # the matrices
    ],
)
def test_a_full_disk_is_told_and_leaves_nothing_broken(
    tiny_model: Path, pictures: Path, tmp_path: Path, method: str, limit: int
) -> None:
    out = tmp_path / "out"
    every = 2 if limit == 2500 else 10  # else the training ends before it stores a state
    words = train(pictures, tiny_model, out, "--method", method, "--every", every)

    full = call(*words, code=2, file_limit=limit)

    assert "is full" in full.err
    assert "run the same command to continue" in full.err
    check_whole(out)
    call(*words)
    check_whole(out)
    outcome = read_json(out / "training.json")
    assert outcome["steps"] == 4
    assert all((out / name).exists() for name in [*outcome["files"], "report.html"])


def test_a_cache_that_cannot_be_written_or_read_stops_nothing(
    model_with_words: Path, pictures: Path, tmp_path: Path
) -> None:
    def first_word(out: Path, cache: Path) -> dict:
        words = train(pictures, model_with_words, out, "--init", "nearest", steps=1)
        call(*words, environment={"XDG_CACHE_HOME": str(cache)})
        return read_json(out / "training.json")["initial"]

    (tmp_path / "file").write_text("no folder")
    without = first_word(tmp_path / "without", tmp_path / "file" / "cache")
    cached = first_word(tmp_path / "cached", tmp_path / "cache")
    (file,) = (tmp_path / "cache").rglob("*.json")
    stored = file.read_text()
    file.write_text(stored[:20])
    mended = first_word(tmp_path / "mended", tmp_path / "cache")
    assert without == cached == mended
    assert without["how"] == "nearest"
    assert file.read_text() == stored


# -- folders -----------------------------------------------------------------------------------------------


def test_a_folder_of_anything_else_is_refused(
    finished: Path, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert f"{file} is a file" in call(*train(pictures, tiny_model, file), code=2).err
    below = call(*train(pictures, tiny_model, file / "out"), code=2)
    assert f"cannot write into {file / 'out'} (Not a directory)" in below.err
    assert file.read_text() == "mine"

    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for more, difference in (
        (["--seed", 1], "settings.seed: 0 there, 1 now"),
        (["--token", "<dog>"], "token: <cat> there, <dog> now"),
        (["--stop", "plateau"], "settings.stop: budget there, plateau now"),
    ):
        other = call(*train(pictures, tiny_model, finished, *more), code=2)
        assert f"{finished} holds another training ({difference})" in other.err
    others = draw_concept(tmp_path / "dog", 1)
    assert "another training (pictures: sha256" in call(*train(others, tiny_model, finished), code=2).err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_folder_in_which_nothing_is_stored_may_become_any_other(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_text('{"token": "<dog>"}')
    call(*train(pictures, tiny_model, out))
    assert read_json(out / "settings.json")["token"] == "<cat>"


TRAINING_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "list": lambda _: b"[]",
    "other": lambda _: b'{"schema": "t2iprobe.run/1"}',
    "binary": lambda _: b"\xff\xfe\x00",
}


@pytest.mark.parametrize("damage", TRAINING_DAMAGE)
def test_a_damaged_outcome_is_named(
    finished: Path, tiny_model: Path, pictures: Path, tmp_path: Path, damage: str
) -> None:
    out = copy(finished, tmp_path)
    file = out / "training.json"
    file.write_bytes(TRAINING_DAMAGE[damage](file.read_bytes()))
    for words in (train(pictures, tiny_model, out), ["inversion", "evaluate", out]):
        assert f"{file} is damaged: remove it, and the same command trains again" in call(*words, code=2).err
    if damage == "truncated":
        file.unlink()
        call(*train(pictures, tiny_model, out))
        assert read_json(file)["steps"] == 4


@pytest.mark.parametrize("damage", ["truncated", "empty", "list", "binary"])
def test_damaged_settings_are_named(
    finished: Path, tiny_model: Path, pictures: Path, tmp_path: Path, damage: str
) -> None:
    out = copy(finished, tmp_path)
    file = out / "settings.json"
    file.write_bytes(TRAINING_DAMAGE[damage](file.read_bytes()))
    assert f"{file} is damaged" in call(*train(pictures, tiny_model, out), code=2).err
    file.unlink()
    assert "without its settings.json" in call(*train(pictures, tiny_model, out), code=2).err


def damage_state(path: Path, damage: str) -> None:
    content = path.read_bytes()
    tensors = load_file(path)
    if damage == "truncated":
        path.write_bytes(content[:-50])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("<html>404</html>")
    elif damage == "no metadata":
        save_file(tensors, path)
    elif damage == "no sum":
        save_file({name: tensor for name, tensor in tensors.items() if name != "sum"}, path)
    elif damage == "other shape":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(tensors | {"value.0": torch.zeros(3, 7)}, path, metadata)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "no metadata", "no sum", "other shape"])
def test_a_damaged_state_is_named_and_can_be_removed(
    killed: Path, tiny_model: Path, pictures: Path, tmp_path: Path, damage: str
) -> None:
    out = copy(killed, tmp_path)
    state = out / "state.safetensors"
    damage_state(state, damage)
    words = train(pictures, tiny_model, out, "--every", 1, steps=500)

    done = call(*words, code=2)

    assert f"the state {state} is damaged" in done.err
    assert "remove it to train from the start" in done.err
    if damage == "truncated":
        state.unlink()
        assert start(*words).kill_when(state.exists).code == -signal.SIGKILL


# -- pictures and words ------------------------------------------------------------------------------------


def test_folders_without_pictures_are_told(tiny_model: Path, tmp_path: Path) -> None:
    empty, texts, out = tmp_path / "empty", tmp_path / "texts", tmp_path / "out"
    empty.mkdir()
    texts.mkdir()
    (texts / "notes.txt").write_text("no picture")
    for folder in (empty, texts):
        assert f"{folder} holds no pictures" in call(*train(folder, tiny_model, out), code=2).err
    missing = tmp_path / "missing"
    assert f"there is no folder {missing}" in call(*train(missing, tiny_model, out), code=2).err
    script = call(SCRIPTS / "train_concepts.py", empty, "--out", out, "--model", tiny_model, code=2)
    assert f"{empty} has no subfolders" in script.err
    assert not out.exists()


def test_an_unreadable_picture_is_named_or_skipped(tiny_model: Path, tmp_path: Path) -> None:
    folder, out = draw_concept(tmp_path / "cat"), tmp_path / "out"
    bad = folder / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])

    refused = call(*train(folder, tiny_model, out), code=2)
    assert f"cannot read the picture {bad}" in refused.err
    assert "--skip-bad" in refused.err
    assert not out.exists()

    call(*train(folder, tiny_model, out, "--skip-bad"))
    assert [Path(name).name for name in read_json(out / "training.json")["pictures"]] == ["0.png", "2.png"]

    for name in ("0.png", "2.png"):
        (folder / name).write_bytes(b"")
    none = call(*train(folder, tiny_model, tmp_path / "none", "--skip-bad"), code=2)
    assert "3 pictures, none of them readable" in none.err


@pytest.fixture(scope="module")
def model_with_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose vocabulary holds <cat> and <fat-cat>_1."""
    pipeline = tiny_pipeline("sd")
    pipeline.tokenizer.add_tokens(["<cat>", "<fat-cat>_1"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    folder = tmp_path_factory.mktemp("models") / "with_tokens"
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("<my cat>", "the token '<my cat>' contains a space: write one word, such as <my-cat>"),
        ("<Cat>", "the token '<Cat>' is not <name> in lower-case letters"),
        ("cat", "the token 'cat' is not <name>"),
        ("<>", "the token '<>' is not <name>"),
        ("", "the token '' is not <name>"),
        ("<cat>", "the token <cat> exists in the model's vocabulary: take another name"),
        ("<fat-cat>", "of the tokens <fat-cat> and <fat-cat>_1 one begins the other"),
    ],
)
def test_a_token_that_cannot_be_one_is_refused(
    model_with_tokens: Path, pictures: Path, tmp_path: Path, token: str, message: str
) -> None:
    out = tmp_path / "out"
    assert message in call(*train(pictures, model_with_tokens, out, token=token), code=2).err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "row_rates=1"], "unknown setting 'row_rates', did you mean row_rate"),
        (["--set", "nosuch"], "--set takes key=value"),
        (["--method", "textual-inversoin"], "did you mean textual-inversion?"),
        (["--stop", "plato"], "there is no stopping rule 'plato': choose plateau"),
        (["--fixed", "1111"], "the code of fixed parts is five of 0 and 1"),
        (["--vectors", "0"], "bad value for vectors: 0"),
        (["--vectors", "80"], "of the 77 tokens that are read none is left for <cat>#79"),
        (["--template", f"{'very ' * 20}old {{}}"], "is too long: of the 77 tokens"),
        (["--set", "background=nocolour"], "bad value for background: 'nocolour'"),
        (["--row-rate", "inf"], "bad value for row_rate: inf"),
        (["--template", "a photo"], "the template 'a photo' has no place for the token"),
        (["--init", ","], "--init takes nearest, random, or words by commas"),
        (["--dtype", "float64"], "bad value for dtype: 'float64'"),
        (["--device", "nosuch"], "there is no device 'nosuch' here"),
        (["--model", "nosuch"], "there is no model 'nosuch'"),
        (["--prior", "dog"], "leave --prior out"),
        (["--size", "33"], "a multiple of 8 pixels a side, not 33"),
        (["--set", "features=nosuch", "--set", "evaluate=1"], "there are no features 'nosuch'"),
    ],
)
def test_settings_that_cannot_be_are_told_before_anything_is_written(
    tiny_model: Path, pictures: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert message in call(*train(pictures, tiny_model, out, *words), code=2).err
    assert not out.exists()


def test_a_pipeline_that_cannot_do_the_method_is_told(pictures: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "ldm", tmp_path / "out"
    tiny_pipeline("ldm").save_pretrained(model)
    for method, can in (
        ("custom-diffusion", "StableDiffusionPipeline can be"),
        ("dreambooth-lora", "StableDiffusionPipeline, StableDiffusionXLPipeline, FluxPipeline can be"),
    ):
        done = call(*train(pictures, model, out, "--method", method), code=2)
        assert f"{method} cannot train a LDMTextToImagePipeline: {can}" in done.err
    assert not out.exists()


# -- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rate"),
    [
        ("textual-inversion", "--row-rate"),
        ("dreambooth-lora", "--rate"),
        ("custom-diffusion", "--rate"),
    ],
)
def test_a_loss_that_overflows_keeps_the_last_good_values(
    tiny_model: Path, pictures: Path, tmp_path: Path, method: str, rate: str
) -> None:
    out = tmp_path / "out"
    words = train(pictures, tiny_model, out, "--method", method, rate, "1e30", "--every", 2, steps=20)

    done = call(*words, code=2)

    assert "<cat>: the loss was not a number at step 2: the state of step 0 is kept" in done.err
    outcome = read_json(out / "training.json")
    assert (outcome["stop"]["rule"], outcome["stop"]["step"], outcome["steps"]) == ("nan", 0, 0)
    check_whole(out)
    for name in outcome["files"]:
        assert all(tensor.isfinite().all() for tensor in load_file(out / name).values())
    assert (out / "report.html").exists()
    again = call(*words, code=2)
    assert again.err == done.err
    assert call("inversion", "inspect", out / "learned_embeds.safetensors", "--json").code == 0


@pytest.mark.parametrize("init", ["thing", "nearest"])
def test_a_model_that_computes_nan_is_told(
    model_with_words: Path, pictures: Path, tmp_path: Path, init: str
) -> None:
    model, out = Path(shutil.copytree(model_with_words, tmp_path / "model")), tmp_path / "out"
    weights = next(model.glob("unet/*.safetensors"))
    tensors = load_file(weights)
    tensors["conv_out.bias"][:] = float("nan")
    save_file(tensors, weights, {"format": "pt"})

    done = call(*train(pictures, model, out, "--init", init), code=2)

    assert "not a number" in done.err
    assert "float32" in done.err
    if init == "thing":
        assert read_json(out / "training.json")["stop"]["rule"] == "nan"
        check_whole(out)


def test_a_bad_concept_keeps_no_other_from_training(tiny_model: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("cat", "dog")):
        draw_concept(tmp_path / "concepts" / name, seed)
    settings = ("max_steps=2", "every=1", "dtype=float32", "init=thing", "row_rate=1e30")
    words = [
        *(SCRIPTS / "train_concepts.py", tmp_path / "concepts", "--out", tmp_path / "out"),
        *("--model", tiny_model, "--stop", "budget", "--together", 1),
        *(word for word in QUICK if word.startswith("--set")),
        *(f"--set={pair}" for pair in settings),
    ]
    assert "<cat>, <dog>: the loss was not a number" in call(*words, code=2).err
    assert all((tmp_path / "out" / name / "training.json").exists() for name in ("cat", "dog"))

"""The loop: concepts that share a pass train as alone, a killed training ends as an unbroken one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from concept_pictures import draw_concept
from safetensors import safe_open
from safetensors.torch import load_file

from t2iprobe.errors import UserError
from t2iprobe.inversion.backbones import Backbone
from t2iprobe.inversion.commands import (
    evaluate_folder,
    load_backbone,
    load_training,
    read_concept,
    train_folder,
    train_folders,
)
from t2iprobe.inversion.embeddings import Rows
from t2iprobe.inversion.settings import Training
from t2iprobe.inversion.training import read_outcome, train_concepts

QUICK = {"grid": 0, "evaluate": 0, "dtype": "float32", "batch": 2, "items": 4, "steps": 2, "init": "thing"}


def settings_for(model: Path, **more: Any) -> Training:
    return load_training({"model": str(model), **QUICK, "stop": "budget", "max_steps": 12, **more})


def rows_of(out: Path) -> torch.Tensor:
    (rows,) = load_file(out / "learned_embeds.safetensors").values()
    return rows


def train_some(backbone: Backbone, settings: Training, folders: dict[str, Path], out: Path) -> dict[str, Any]:
    jobs = [
        (read_concept(folder, f"<{name}>", settings, backbone), out / name)
        for name, folder in folders.items()
    ]
    return dict(zip(folders, train_concepts(backbone, jobs, settings), strict=True))


@pytest.mark.parametrize("model", ["tiny", "embedded"])
def test_three_concepts_in_one_pass_train_as_alone(model: str, tiny_model: Path, tmp_path: Path) -> None:
    # Adam makes of a rounding error in a gradient near zero a share of the rate: small steps, small errors.
    name, row_rate = (tiny_model, None) if model == "tiny" else (Path(model), 0.002)
    settings = settings_for(name, max_steps=10, row_rate=row_rate)
    backbone = load_backbone(settings)
    folders = {name: draw_concept(tmp_path / name, seed) for seed, name in enumerate(("cat", "dog", "cow"))}
    together = train_some(backbone, settings, folders, tmp_path / "together")
    for name, folder in folders.items():
        alone = train_some(backbone, settings, {name: folder}, tmp_path / "alone")
        assert (rows_of(tmp_path / "together" / name) - rows_of(tmp_path / "alone" / name)).abs().max() < 1e-5
        curves = [torch.tensor(found["curve"]) for found in (together[name], alone[name])]
        assert torch.allclose(*curves, atol=1e-5)
        start = rows_of(tmp_path / "alone" / name) - rows_of(tmp_path / "alone" / "cat")
        assert name == "cat" or start.abs().max() > 1e-3  # they did learn, each its own


def test_a_concept_that_has_stopped_leaves_the_pass_to_one_that_waits(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from t2iprobe.inversion import training

    settings = settings_for(tiny_model, max_steps=20, every=5, together=2)
    sizes = []
    original = training.denoising_losses

    def count(backbone: Any, moments: Any, inputs: Any, prompts: Any) -> Any:
        if torch.is_grad_enabled():
            sizes.append(len(inputs))
        return original(backbone, moments, inputs, prompts)

    monkeypatch.setattr(training, "denoising_losses", count)
    original_make = training._make_learner

    def make(*arguments: Any) -> Any:
        learner = original_make(*arguments)
        if learner.concept.token == "<dog>":
            learner.cap = 10
        return learner

    monkeypatch.setattr(training, "_make_learner", make)
    folders = {name: draw_concept(tmp_path / name, seed) for seed, name in enumerate(("cat", "dog", "cow"))}
    backbone = load_backbone(settings)
    done = train_some(backbone, settings, folders, tmp_path / "out")
    assert [found["steps"] for found in done.values()] == [20, 10, 20]
    assert sizes == [2] * 20 + [1] * 10  # the cat with the dog, then with the cow, which goes on alone
    alone = train_some(backbone, settings, {"cow": folders["cow"]}, tmp_path / "alone")
    assert torch.allclose(torch.tensor(alone["cow"]["curve"]), torch.tensor(done["cow"]["curve"]), atol=1e-5)
    assert (rows_of(tmp_path / "alone" / "cow") - rows_of(tmp_path / "out" / "cow")).abs().max() < 1e-4


@pytest.mark.parametrize("model", ["tiny", "embedded"])
def test_the_vocabulary_stays_byte_for_byte(
    model: str, tiny_model: Path, tmp_path: Path, concept_folder: Path
) -> None:
    settings = settings_for(tiny_model if model == "tiny" else Path(model), max_steps=5)
    backbone = load_backbone(settings)
    encoder, denoiser = backbone.pipeline.text_encoder, backbone.pipeline.unet
    before = [p.detach().numpy().tobytes() for p in (*encoder.parameters(), *denoiser.parameters())]
    seen = []
    original = Rows.remove

    def look(self: Rows) -> None:
        seen.append(self._embeddings["clip_l"].vocabulary.weight.detach().numpy().tobytes())
        original(self)

    Rows.remove = look  # type: ignore[method-assign]
    try:
        train_some(backbone, settings, {"cat": concept_folder}, tmp_path / "out")
    finally:
        Rows.remove = original  # type: ignore[method-assign]
    assert seen == [before[0]]
    assert [p.detach().numpy().tobytes() for p in (*encoder.parameters(), *denoiser.parameters())] == before


def test_the_outcome_tells_what_stopped_it_and_the_whole_curve(
    tiny_model: Path, tmp_path: Path, concept_folder: Path
) -> None:
    settings = settings_for(tiny_model, every=4, grid=2, vectors=2)
    out = tmp_path / "out"
    found = train_some(load_backbone(settings), settings, {"cat": concept_folder}, out.parent / "out")["cat"]
    out = out / "cat"
    assert json.loads((out / "training.json").read_text()) == json.loads(json.dumps(found))
    assert found["stop"]["rule"] == "budget"
    assert found["stop"]["step"] == found["steps"] == 12
    assert [step for step, _ in found["curve"]] == [0, 4, 8, 12]
    assert [step for step, *_ in found["bands"]] == [0, 4, 8, 12]
    assert found["train_loss"][0][0] == 10
    assert {grid["step"] for grid in found["grids"]} == {0, 12}
    assert all((out / file).exists() for grid in found["grids"] for file in grid["files"])
    assert rows_of(out).shape == (2, 32)
    assert (out / "cat.safetensors").exists()
    assert (out / "report.html").exists()
    assert not (out / "state.safetensors").exists()


def test_a_training_that_ran_out_of_steps_says_so(
    tiny_model: Path, tmp_path: Path, concept_folder: Path
) -> None:
    settings = settings_for(tiny_model, stop="plateau", every=2, max_steps=4)
    found = train_some(load_backbone(settings), settings, {"cat": concept_folder}, tmp_path)["cat"]
    assert (found["stop"]["rule"], found["stop"]["reason"]) == ("cap", "the cap of 4 steps was reached")
    with safe_open(tmp_path / "cat" / "learned_embeds.safetensors", "pt") as file:
        assert file.metadata()["stop_rule"] == "cap"
    assert "Under the rule <em>plateau</em>" in (tmp_path / "cat" / "report.html").read_text()


def test_the_same_training_again_is_done_and_another_is_refused(
    tiny_model: Path, tmp_path: Path, concept_folder: Path
) -> None:
    settings = settings_for(tiny_model)
    backbone = load_backbone(settings)
    first = train_some(backbone, settings, {"cat": concept_folder}, tmp_path / "out")
    written = (tmp_path / "out" / "cat" / "learned_embeds.safetensors").stat().st_mtime_ns
    again = train_some(backbone, settings, {"cat": concept_folder}, tmp_path / "out")
    assert again == json.loads(json.dumps(first))
    assert (tmp_path / "out" / "cat" / "learned_embeds.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="another training.*seed: 0 there, 1 now"):
        train_some(backbone, settings_for(tiny_model, seed=1), {"cat": concept_folder}, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("tiny", "textual-inversion"),
        ("tiny", "dreambooth-lora"),
        ("tiny", "custom-diffusion"),
        ("embedded", "textual-inversion"),
    ],
)
def test_a_killed_training_ends_as_an_unbroken_one(
    model: str, tiny_model: Path, tmp_path: Path, concept_folder: Path, method: str
) -> None:
    more = ["--set=grid=0", "--set=evaluate=0", "--set=items=4", "--set=batch=1", "--init", "thing"]
    command = [
        *(sys.executable, "-m", "t2iprobe", "inversion", "train", str(concept_folder), "--token", "<cat>"),
        *("--model", str(tiny_model) if model == "tiny" else model, "--method", method, "--stop", "budget"),
        *("--max-steps", "200" if model == "tiny" else "30"),
        *("--dtype", "float32", "--every", "2", *more),
    ]
    environment = os.environ | {"T2IPROBE_STATE_SECONDS": "0", "OMP_NUM_THREADS": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*command, "--out", str(whole)], check=True, env=environment, stdout=subprocess.DEVNULL)
    process = subprocess.Popen([*command, "--out", str(broken)], env=environment, stdout=subprocess.DEVNULL)
    state, seen = broken / "state.safetensors", set()
    while len(seen) < 8:  # some steps, by their states
        assert process.poll() is None, "it ended before it could be killed"
        if state.exists():
            seen.add(state.stat().st_mtime_ns)
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "training.json").exists()
    subprocess.run([*command, "--out", str(broken)], check=True, env=environment, stdout=subprocess.DEVNULL)
    outcomes = [json.loads((out / "training.json").read_text()) for out in (whole, broken)]
    assert outcomes[0]["curve"] == outcomes[1]["curve"]
    assert outcomes[0]["train_loss"] == outcomes[1]["train_loss"]
    for name in outcomes[0]["files"]:
        if name.endswith(".safetensors"):
            one, other = load_file(whole / name), load_file(broken / name)
            assert set(one) == set(other)
            assert all(torch.equal(one[key], other[key]) for key in one), name


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_rows(
    tiny_model: Path, tmp_path: Path, concept_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from t2iprobe.inversion import training

    settings = settings_for(tiny_model, every=2, max_steps=20)
    original, calls = training.denoising_losses, []

    def spoil(backbone: Any, moments: Any, inputs: Any, prompts: Any) -> torch.Tensor:
        losses = original(backbone, moments, inputs, prompts)
        if torch.is_grad_enabled():
            calls.append(1)
        return losses * torch.nan if len(calls) > 7 else losses

    monkeypatch.setattr(training, "denoising_losses", spoil)
    backbone = load_backbone(settings)
    with pytest.raises(UserError, match="not a number at step 8: the state of step 6 is kept"):
        train_some(backbone, settings, {"cat": concept_folder}, tmp_path / "out")
    monkeypatch.undo()
    out = tmp_path / "out" / "cat"
    assert json.loads((out / "training.json").read_text())["stop"]["rule"] == "nan"
    six = train_some(
        backbone, settings_for(tiny_model, every=2, max_steps=6), {"cat": concept_folder}, tmp_path / "6"
    )
    assert six["cat"]["steps"] == 6
    assert torch.equal(rows_of(out), rows_of(tmp_path / "6" / "cat"))


@pytest.mark.parametrize("method", ["dreambooth-lora", "custom-diffusion"])
def test_weights_train_beside_the_rows_and_leave_the_model_as_it_was(
    tiny_model: Path, tmp_path: Path, concept_folder: Path, method: str
) -> None:
    settings = settings_for(tiny_model, method=method, prior="dog", prior_pictures=2)
    backbone = load_backbone(settings)
    before = {name: value.clone() for name, value in backbone.denoiser.state_dict().items()}
    found = train_some(backbone, settings, {"cat": concept_folder}, tmp_path)["cat"]
    after = backbone.denoiser.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert found["train_loss"]
    assert len(found["files"]) >= 2


def test_adapters_begin_by_the_seed(
    tiny_model: Path, tmp_path: Path, concept_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from t2iprobe.inversion.methods import DreamBoothLora

    begun = []
    original = DreamBoothLora.save

    def save(self: DreamBoothLora, *arguments: Any) -> list[str]:
        begun.append(self.weights()[0].detach().clone())
        return original(self, *arguments)

    monkeypatch.setattr(DreamBoothLora, "save", save)
    for number, seed in enumerate((0, 0, 1)):
        settings = settings_for(
            tiny_model, method="dreambooth-lora", seed=seed, max_steps=1, rate=1e-9, average=0.0
        )
        train_some(load_backbone(settings), settings, {"cat": concept_folder}, tmp_path / str(number))
    assert torch.equal(begun[0], begun[1])
    assert (begun[0] - begun[2]).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["dreambooth-lora", "custom-diffusion"])
def test_a_token_parts_from_the_priors_word_where_it_begins(
    tiny_model: Path, tmp_path: Path, concept_folder: Path, method: str
) -> None:
    # Were they the same row, the prior's pictures and the concept's would be taught to the same prompts.
    settings = settings_for(tiny_model, method=method, init="d", prior="d", prior_pictures=2)
    backbone = load_backbone(settings)
    train_some(backbone, settings, {"cat": concept_folder}, tmp_path)
    tokenizer, encoder = backbone.encoders["clip_l"]
    (word,) = tokenizer("d", add_special_tokens=False).input_ids
    vocabulary = encoder.get_input_embeddings().weight
    moved = (rows_of(tmp_path / "cat")[0] - vocabulary[word]).square().mean().sqrt()
    assert moved > 0.05 * vocabulary.square().mean().sqrt()


@pytest.mark.parametrize("flip", [True, False])
def test_the_prior_trains_with_the_caption_that_drew_it_and_mirrored_as_the_rest(
    tiny_model: Path, tmp_path: Path, concept_folder: Path, monkeypatch: pytest.MonkeyPatch, flip: bool
) -> None:
    from t2iprobe.inversion import training

    original, drawn_from, trained = training.draw_pictures, list[str](), list[Any]()
    monkeypatch.setattr(
        training, "draw_pictures", lambda *given: drawn_from.extend(given[1]) or original(*given)
    )
    losses = training.denoising_losses

    def note(backbone: Any, moments: Any, inputs: Any, prompts: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            trained.append(inputs)
        return losses(backbone, moments, inputs, prompts)

    monkeypatch.setattr(training, "denoising_losses", note)
    settings = settings_for(tiny_model, method="custom-diffusion", prior="dog", prior_pictures=2, flip=flip)
    train_some(load_backbone(settings), settings, {"cat": concept_folder}, tmp_path)
    assert {caption for _, prior in trained for caption in prior.captions} == set(drawn_from)
    for which in (0, 1):
        assert any(bool(inputs[which].flips.any()) for inputs in trained) == flip


def test_textual_inversion_takes_no_prior(tiny_model: Path, tmp_path: Path, concept_folder: Path) -> None:
    settings = settings_for(tiny_model, prior="dog")
    with pytest.raises(UserError, match="leave --prior out"):
        train_some(load_backbone(settings), settings, {"cat": concept_folder}, tmp_path)


def test_a_folder_of_concepts_is_trained_together_and_in_shares(tiny_model: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("Cat", "dog_2", "cow")):
        draw_concept(tmp_path / "concepts" / name, seed)
    settings = settings_for(tiny_model, max_steps=2)
    whole = train_folders(tmp_path / "concepts", settings, tmp_path / "out")
    assert {name: found["token"] for name, found in whole.items()} == {
        "Cat": "<cat>",
        "cow": "<cow>",
        "dog_2": "<dog-2>",
    }
    parts = [
        train_folders(tmp_path / "concepts", settings, tmp_path / "parts", shard=f"{i}/2") for i in (0, 1)
    ]
    assert [sorted(part) for part in parts] == [["Cat", "dog_2"], ["cow"]]
    with pytest.raises(UserError, match="no subfolders"):
        train_folders(tmp_path / "concepts" / "cow", settings, tmp_path / "none")


@pytest.mark.parametrize("shard", ["0/1", "0/2", "1/2"])
def test_two_concepts_of_one_token_are_refused(tiny_model: Path, tmp_path: Path, shard: str) -> None:
    for name in ("a b", "a_b"):
        draw_concept(tmp_path / "concepts" / name)
    with pytest.raises(UserError, match=r"a b and .*a_b make the same token <a-b>: rename one"):
        train_folders(tmp_path / "concepts", settings_for(tiny_model), tmp_path / "out", shard=shard)


def test_a_folder_that_makes_no_token_is_named(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("dog", "猫"):
        draw_concept(tmp_path / "concepts" / name)
    with pytest.raises(UserError, match="the folder .*猫 makes no token: give it a name with a letter"):
        train_folders(tmp_path / "concepts", settings_for(tiny_model), tmp_path / "out")


def test_the_clip_rule_watches_likeness_to_the_pictures(
    tiny_model: Path, tmp_path: Path, concept_folder: Path
) -> None:
    settings = settings_for(tiny_model, stop="clip", every=2, max_steps=4)
    found = train_some(load_backbone(settings), settings, {"cat": concept_folder}, tmp_path)["cat"]
    assert found["settings"]["stop"] == "clip"
    assert found["stop"]["rule"] == "cap"  # three looks are too few for it
    assert [step for step, _ in found["curve"]] == [0, 2, 4]
    assert all(-1 <= likeness <= 1 for _, likeness in found["curve"])
    assert len({likeness for _, likeness in found["curve"]}) > 1  # pictures of now, not of the beginning


def test_an_evaluation_later_compares_with_where_the_training_began(
    tiny_model: Path, tmp_path: Path, concept_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from t2iprobe.inversion import initialization

    words = iter(["abc"])  # looked for once
    monkeypatch.setattr(initialization, "nearest_words", lambda *_: [[next(words), 0.1]])
    settings = settings_for(tiny_model, init="nearest", evaluate=1, max_steps=2, row_rate=1.0)
    first = train_folder(concept_folder, "<cat>", settings, tmp_path)["evaluation"]
    again = evaluate_folder(tmp_path, 1)["evaluation"]
    assert again == first
    assert first["likeness"]["before"]["value"] != first["likeness"]["value"]


def test_an_evaluation_of_another_model_or_other_pictures_is_refused(
    tiny_model: Path, tmp_path: Path, concept_folder: Path
) -> None:
    settings, out = settings_for(tiny_model, max_steps=1), tmp_path / "out"
    train_folder(concept_folder, "<cat>", settings, out)
    stored = (out / "training.json").read_text()
    draw_concept(tmp_path / "other", seed=9)
    (tmp_path / "other" / "0.png").rename(concept_folder / "9.png")
    with pytest.raises(UserError, match="the pictures in .*cat are not those that .*out was trained with"):
        evaluate_folder(out, 1)
    assert (out / "training.json").read_text() == stored
    outcome = json.loads(stored)
    del outcome["pictures_hash"]  # of an older version
    (out / "training.json").write_text(json.dumps(outcome))
    assert evaluate_folder(out, 1)["evaluation"]["concept_pictures"] == 4
    (out / "training.json").write_text(json.dumps({**outcome, "model_hash": "sha256:0"}))
    with pytest.raises(UserError, match="is not the model that .*out was trained with"):
        evaluate_folder(out, 1)


def limit_memory(backbone: Backbone, fits: Callable[[int], bool]) -> None:
    """Let the denoiser run out of memory at batches for which `fits` says no."""

    def check(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        if not fits(len(given[0])):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    backbone.denoiser.register_forward_pre_hook(check)


def test_a_step_that_does_not_fit_the_memory_is_told(
    tiny_model: Path, tmp_path: Path, concept_folder: Path
) -> None:
    settings = settings_for(tiny_model, batch=4)
    backbone = load_backbone(settings)
    limit_memory(backbone, lambda batch: batch < 4 or not torch.is_grad_enabled())
    with pytest.raises(UserError, match="a training step does not fit .*: lower --together, batch .*or size"):
        train_some(backbone, settings, {"cat": concept_folder}, tmp_path)


def test_a_look_that_does_not_fit_the_memory_is_told(
    tiny_model: Path, tmp_path: Path, concept_folder: Path
) -> None:
    settings = settings_for(tiny_model, items=4)
    backbone = load_backbone(settings)
    limit_memory(backbone, lambda batch: batch < 4)
    with pytest.raises(UserError, match="a training step does not fit"):
        train_some(backbone, settings, {"cat": concept_folder}, tmp_path)


@pytest.mark.parametrize("why", ["memory", "NaN"])
def test_a_training_is_kept_where_its_outcome_cannot_be_drawn(
    tiny_model: Path, tmp_path: Path, concept_folder: Path, why: str
) -> None:
    settings = settings_for(tiny_model, grid=2, evaluate=1)
    backbone = load_backbone(settings)
    drawn: list[int] = []

    def break_later(_: Any, given: Any, made: torch.Tensor) -> torch.Tensor:
        drawn.append(1)
        if len(drawn) == 1:  # the grid of the beginning
            return made
        if why == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return made * torch.nan

    backbone.autoencoder.decoder.register_forward_hook(break_later)
    message = "<cat> is trained, but nothing was drawn at its end: .*; `t2iprobe inversion evaluate .*cat`"
    with pytest.warns(UserWarning, match=message):
        found = train_some(backbone, settings, {"cat": concept_folder}, tmp_path)["cat"]
    assert (found["steps"], found["evaluation"]) == (12, None)
    assert [grid["step"] for grid in found["grids"]] == [0]
    assert read_outcome(tmp_path / "cat") == json.loads(json.dumps(found))
    assert all((tmp_path / "cat" / name).exists() for name in [*found["files"], "report.html"])

    mended = evaluate_folder(tmp_path / "cat", 1)
    assert mended["evaluation"]["likeness"]["before"]
    assert {**mended, "evaluation": None} == json.loads(json.dumps(found))

import json
import shutil
from pathlib import Path

import pytest
import torch
from original_format import save_single_file

from t2iprobe.devices import best_dtype, resolve_dtype
from t2iprobe.errors import UserError
from t2iprobe.pipelines import load_pipeline, locate_model, model_hash, setting_arguments
from t2iprobe.storage import hash_files
from t2iprobe.testing import FAMILIES, tiny_pipeline


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_pipeline_loads_as_its_own_class(tmp_path: Path, family: str) -> None:
    made = tiny_pipeline(family)
    made.save_pretrained(tmp_path / family)

    loaded = load_pipeline(str(tmp_path / family), device="cpu", dtype="float32")

    assert type(loaded) is type(made)  # LDM is not in AutoPipeline's map
    name = "unet" if hasattr(made, "unet") else "transformer"
    pairs = zip(getattr(made, name).parameters(), getattr(loaded, name).parameters(), strict=True)
    assert all(torch.equal(before, after) for before, after in pairs)


def test_a_single_file_loads_with_a_folder_of_configurations(tiny_model: Path, tmp_path: Path) -> None:
    made = tiny_pipeline("sd")
    file = tmp_path / "model.safetensors"
    save_single_file(made, file)

    loaded = load_pipeline(f"{file}@{tiny_model}", device="cpu", dtype="float32")

    for component in ("unet", "vae", "text_encoder"):
        for name, value in getattr(made, component).state_dict().items():
            assert torch.equal(value, getattr(loaded, component).state_dict()[name]), name
    with pytest.raises(UserError, match=r"give .*model\.safetensors@FOLDER"):
        load_pipeline(str(file), device="cpu", dtype="float32")


def test_bfloat16_on_a_cpu_lowers_only_what_autocast_would_cast(tiny_model: Path) -> None:
    loaded = load_pipeline(str(tiny_model), device="cpu", dtype="bfloat16")

    assert loaded.unet.conv_in.weight.dtype == torch.bfloat16
    assert loaded.unet.conv_norm_out.weight.dtype == torch.float32
    assert {weight.dtype for weight in loaded.text_encoder.parameters()} == {torch.float32}


def test_the_scheduler_can_be_replaced(tiny_model: Path) -> None:
    loaded = load_pipeline(str(tiny_model), device="cpu", dtype="float32", scheduler="EulerDiscreteScheduler")

    assert type(loaded.scheduler).__name__ == "EulerDiscreteScheduler"
    assert loaded.scheduler.config.beta_end == 0.012
    with pytest.raises(UserError, match="did you mean EulerDiscreteScheduler"):
        load_pipeline(str(tiny_model), device="cpu", dtype="float32", scheduler="EulerDiscreteSchedule")


def test_a_safety_checker_in_the_folder_is_not_loaded(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(tiny_model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]  # as SD 1 has it; the class is gone
    index["requires_safety_checker"] = True
    (folder / "model_index.json").write_text(json.dumps(index))

    assert load_pipeline(str(folder), device="cpu", dtype="float32").safety_checker is None


def test_fp16_files_alone_are_found(tmp_path: Path) -> None:
    tiny_pipeline("sd").to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")

    assert load_pipeline(str(tmp_path / "half"), device="cpu", dtype="float32").unet.dtype == torch.float32


def test_settings_take_the_names_of_the_family() -> None:
    class Karlo:
        def __call__(self, prompt, prior_num_inference_steps, decoder_num_inference_steps,
                     prior_guidance_scale, decoder_guidance_scale):  # fmt: skip
            pass

    class QwenImagePipeline:
        def __call__(self, prompt, negative_prompt, true_cfg_scale, guidance_scale, num_inference_steps):
            pass

    assert setting_arguments(tiny_pipeline("sd"), 3, 5.0, 64) == {
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "height": 64,
        "width": 64,
    }
    assert setting_arguments(Karlo(), 25, 4.0, None) == {
        "prior_num_inference_steps": 25,
        "decoder_num_inference_steps": 25,
        "prior_guidance_scale": 4.0,
        "decoder_guidance_scale": 4.0,
    }
    assert setting_arguments(QwenImagePipeline(), None, 4.0, None) == {
        "true_cfg_scale": 4.0,
        "negative_prompt": " ",
    }
    with pytest.raises(UserError, match="Karlo takes no size"):
        setting_arguments(Karlo(), None, None, 64)


def test_the_hash_follows_weights_and_configuration_but_not_what_is_unused(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model, folder)
    original = model_hash(str(tiny_model))
    assert model_hash(str(folder)) == original

    (folder / "README.md").write_text("a card")
    (folder / ".cache.json").write_text("{}")
    assert model_hash(str(folder)) == original
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_hash(str(folder)) != original


def test_large_files_in_the_hub_cache_are_hashed_by_their_name(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    (tmp_path / "link").symlink_to(blob)

    assert hash_files({"w": tmp_path / "link"}) != hash_files({"w": blob})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nosuch", "there is no model 'nosuch'"),
        ("folder/model.safetensors", "there is no model"),
        ("some/model", "cannot get 'some/model' from the hub"),
    ],
)
def test_a_model_that_is_not_there_is_told_in_one_line(model: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        locate_model(model)

    assert "\n" not in str(raised.value)


def test_a_folder_without_model_index_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"is not a diffusers pipeline folder: it has no model_index\.json"):
        locate_model(str(tmp_path))
    with pytest.raises(UserError, match=f"{tiny_model} has one"):
        locate_model(str(tiny_model.parent))


def test_damaged_weights_are_told_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model, folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")

    with pytest.raises(UserError, match="cannot load the model") as raised:
        load_pipeline(str(folder), device="cpu", dtype="float32")

    assert "\n" not in str(raised.value)


def test_a_pickle_that_runs_code_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(tiny_model, folder)
    trap = tmp_path / "trap"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return Path.touch, (trap,)

    torch.save({"conv_in.weight": Evil()}, folder / "unet" / "diffusion_pytorch_model.bin")

    with pytest.raises(UserError, match="cannot load the model"):
        load_pipeline(str(folder), device="cpu", dtype="float32")
    assert not trap.exists()


def test_dtypes() -> None:
    assert resolve_dtype("float16", "cpu") == "float16"
    assert best_dtype("cpu") in ("bfloat16", "float32")
    assert best_dtype("mps") == "float32"
    with pytest.raises(UserError, match="did you mean float32"):
        resolve_dtype("float", "cpu")

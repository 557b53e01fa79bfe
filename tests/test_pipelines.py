import json
import shutil
from pathlib import Path

import pytest
import torch
from original_format import save_single_file
from two_stage_pipelines import tiny_kandinsky

from t2iprobe.devices import best_dtype, inference_context, resolve_dtype
from t2iprobe.errors import UserError
from t2iprobe.pipelines import (
    check_settings,
    find_scheduler,
    load_pipeline,
    locate_model,
    model_hash,
    place_pipeline,
    replace_scheduler,
    setting_arguments,
)
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


def test_what_must_stay_in_float32_does(tmp_path: Path) -> None:
    """T5's last projections, which overflow float16, and the autoencoder of SDXL."""
    tiny_pipeline("flux").save_pretrained(tmp_path / "flux")
    flux = load_pipeline(str(tmp_path / "flux"), device="cpu", dtype="float16")
    dtypes = {name: each.dtype for name, each in flux.text_encoder_2.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name.endswith("wo.weight")} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith("wo.weight")} == {torch.float16}
    assert flux.vae.dtype == torch.float16

    tiny_pipeline("sdxl").save_pretrained(tmp_path / "sdxl")
    sdxl = load_pipeline(str(tmp_path / "sdxl"), device="cpu", dtype="float16")
    assert (sdxl.unet.dtype, sdxl.vae.dtype) == (torch.float16, torch.float32)
    with torch.inference_mode():
        latents = sdxl.vae.encode(torch.zeros(1, 3, 32, 32, dtype=torch.float16)).latent_dist.mean
        assert sdxl.vae.decode(latents.half()).sample.dtype == torch.float32
    place_pipeline(half := tiny_pipeline("sdxl"), "cpu", "float16")  # of networks in float32, too
    assert (half.unet.dtype, half.vae.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_autoencoder_of_three_dimensions_can_be_placed(dtype: str) -> None:
    """Qwen-Image's: torch lays out no kernel of three dimensions with channels last."""
    from diffusers import AutoencoderKLQwenImage, DiffusionPipeline

    class Pipeline(DiffusionPipeline):
        def __init__(self, vae: AutoencoderKLQwenImage) -> None:
            super().__init__()
            self.register_modules(vae=vae)

    autoencoder = AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]
    )
    place_pipeline(Pipeline(autoencoder), "cpu", dtype)
    with inference_context("cpu", dtype):
        assert autoencoder.decode(torch.ones(1, 4, 1, 8, 8)).sample.isfinite().all()


def test_of_two_stages_the_decoder_is_set(tmp_path: Path) -> None:
    pipeline = tiny_kandinsky()
    assert setting_arguments(pipeline, 3, 7.5, 64) == {
        "num_inference_steps": 3,
        "prior_guidance_scale": 7.5,
        "guidance_scale": 7.5,
        "height": 64,
        "width": 64,
    }
    replace_scheduler(pipeline, find_scheduler("EulerDiscreteScheduler"), pipeline.scheduler.config)
    assert pipeline.decoder_pipe.scheduler is pipeline.scheduler
    assert type(pipeline.scheduler).__name__ == "EulerDiscreteScheduler"


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_are_checked_before_anything_is_drawn(family: str) -> None:
    pipeline = tiny_pipeline(family)
    before = pipeline.scheduler.config
    for steps in (None, 1, 4, 50):
        check_settings(pipeline, steps, None)
    check_settings(pipeline, None, 64)
    assert pipeline.scheduler.timesteps is None or len(pipeline.scheduler.timesteps) == 1000
    assert pipeline.scheduler.config == before
    if family in ("sd", "sdxl", "lcm"):
        with pytest.raises(UserError, match=r"cannot draw 65 pixels: .*divisible"):
            check_settings(pipeline, 4, 65)
        with pytest.raises(UserError, match="cannot draw in 2000 steps"):
            check_settings(pipeline, 2000, 64)


def test_a_scheduler_that_lacks_a_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline()

    class Needy:
        @staticmethod
        def from_config(_: object) -> None:
            raise ImportError("Needy requires the torchsde library\nbut it was not found")

    with pytest.raises(UserError, match="Needy cannot draw here: Needy requires the torchsde library$"):
        replace_scheduler(pipeline, Needy, pipeline.scheduler.config)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"


def test_a_class_that_diffusers_lacks_is_told_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet7DModel"]
    (tmp_path / "m" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="cannot load the model"):
        load_pipeline(str(tmp_path / "m"), device="cpu", dtype="float32")


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

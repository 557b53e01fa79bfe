"""What a method saves is what diffusers' own loaders put into a fresh pipeline, and what we load."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t2iprobe.errors import UserError
from t2iprobe.hypernymy.sampling import DiffusersSampler
from t2iprobe.inversion.backbones import Backbone, make_backbone
from t2iprobe.inversion.drawing import draw_pictures
from t2iprobe.inversion.methods import METHODS, Method, find_method
from t2iprobe.inversion.training_page import find_interface_file
from t2iprobe.pipelines import place_pipeline
from t2iprobe.plans import PlanEntry
from t2iprobe.testing import tiny_pipeline

CASES = [
    (method, family)
    for method, families in {
        "textual-inversion": ("sd", "sdxl", "ldm", "flux"),
        "dreambooth-lora": ("sd", "sdxl", "flux"),
        "custom-diffusion": ("sd",),
    }.items()
    for family in families
]


def change(method: Method, token: str) -> None:
    """Give all that trains other values."""
    generator = torch.Generator().manual_seed(1)
    method.rows.set(token, method.rows.at_random(token, generator))
    with torch.no_grad():
        for weight in method.weights():
            weight += 0.3 * torch.randn(weight.shape, generator=generator) * (weight.std() + 0.1)


def predict(backbone: Backbone, prompt: str) -> torch.Tensor:
    size = backbone.size // backbone.factor
    channels = backbone.autoencoder.config.latent_channels
    noisy = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.predict(noisy, torch.tensor([500]), backbone.encode([prompt]))


@pytest.mark.parametrize(("name", "family"), CASES)
def test_what_was_saved_is_loaded_again(name: str, family: str, tmp_path: Path) -> None:
    backbone = make_backbone(tiny_pipeline(family))
    plain = predict(backbone, "a cat")
    method = METHODS[name](backbone, {"<cat>": 2})
    change(method, "<cat>")
    prompt = method.rows.expand("a <cat>")
    taught = predict(backbone, prompt)
    files = method.save("<cat>", tmp_path, {"steps": "3"})
    assert all((tmp_path / file).exists() for file in files)
    method.remove()
    assert torch.equal(predict(backbone, "a cat"), plain)
    again = METHODS[name](backbone, {"<cat>": 2})
    again.load("<cat>", tmp_path)
    assert torch.allclose(predict(backbone, prompt), taught, atol=1e-6)
    again.remove()


@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name, family in CASES if family in ("sd", "sdxl")]
)
def test_diffusers_own_loaders_give_the_same_prediction(name: str, family: str, tmp_path: Path) -> None:
    backbone = make_backbone(tiny_pipeline(family))
    method = METHODS[name](backbone, {"<cat>": 2})
    change(method, "<cat>")
    taught = predict(backbone, method.rows.expand("a <cat>"))
    method.save("<cat>", tmp_path, {})
    fresh: Any = tiny_pipeline(family)
    if name == "dreambooth-lora":
        fresh.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    if name == "custom-diffusion":
        fresh.unet.load_attn_procs(
            str(tmp_path), weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=fresh
        )
    fresh.load_textual_inversion(str(tmp_path / "learned_embeds.safetensors"))
    if family == "sdxl":
        fresh.load_textual_inversion(
            str(tmp_path / "learned_embeds_2.safetensors"),
            text_encoder=fresh.text_encoder_2,
            tokenizer=fresh.tokenizer_2,
        )
    loaded = make_backbone(fresh)
    assert torch.allclose(predict(loaded, "a <cat>"), taught, atol=1e-5)
    assert not torch.allclose(predict(loaded, "a cat"), taught, atol=1e-3)


@pytest.mark.parametrize("name", ["state", "learned_embeds", "learned_embeds_2", "pytorch_lora_weights"])
def test_a_token_named_as_another_file_loses_none(name: str, tmp_path: Path) -> None:
    """The training removes its state, diffusers loads the others."""
    method = METHODS["dreambooth-lora"](make_backbone(tiny_pipeline("sdxl")), {f"<{name}>": 1})
    files = method.save(f"<{name}>", tmp_path, {})
    assert files == [
        *("pytorch_lora_weights.safetensors", "learned_embeds.safetensors", "learned_embeds_2.safetensors"),
        f"token-{name}.safetensors",
    ]
    assert find_interface_file({"files": files}) == files[-1]
    method.load(f"<{name}>", tmp_path)


def test_a_pipeline_that_cannot_do_the_method_is_told_which_can() -> None:
    backbone = make_backbone(tiny_pipeline("ldm"))
    with pytest.raises(UserError, match="custom-diffusion cannot train a LDMTextToImagePipeline: Stable"):
        METHODS["custom-diffusion"](backbone, {"<cat>": 1})
    with pytest.raises(UserError, match="did you mean dreambooth-lora"):
        find_method("dreambooth")


def test_an_adapter_begins_as_the_model_itself() -> None:
    backbone = make_backbone(tiny_pipeline("sd"))
    plain = predict(backbone, "a cat")
    for name in ("dreambooth-lora", "custom-diffusion"):
        method = METHODS[name](backbone, {"<cat>": 1})
        assert torch.allclose(predict(backbone, "a cat"), plain, atol=1e-6)
        assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in method.weights())
        method.remove()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["dreambooth-lora", "custom-diffusion"])
def test_float32_weights_draw_in_a_network_of_half_precision(name: str, dtype: str) -> None:
    """In float16 neither the pictures drawn on the way nor those of a probe have autocast."""
    drawn = []
    for precision in ("float32", dtype):
        pipeline = tiny_pipeline("sd")
        place_pipeline(pipeline, "cpu", precision)
        backbone = make_backbone(pipeline, dtype=precision)
        change(METHODS[name](backbone, {"<cat>": 1}), "<cat>")
        drawn += draw_pictures(backbone, ["a <cat>"], [3], steps=2)
        sampler = DiffusersSampler(pipeline, steps=2, dtype=precision)
        drawn += sampler.sample([PlanEntry("cat.n.01", "base", 0, "a <cat>", 3)])
    exact, *others = (picture.astype(int) for picture in drawn)
    assert all(np.abs(picture - exact).mean() < 3 for picture in others)

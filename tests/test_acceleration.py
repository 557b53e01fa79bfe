"""What is faster says the same: folded norms, other attention, compiled networks and their fallback."""

import warnings
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torchvision import models

from t2iprobe.acceleration import choose_attention, fold_norms
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.sampling import DiffusersSampler
from t2iprobe.pipelines import place_pipeline
from t2iprobe.runs import build_plan
from t2iprobe.testing import tiny_pipeline

PLAN = build_plan([{"samples": 4, "prompts": {"dog.n.01": {"base": "a dog"}}}], 0)


def shake(network: torch.nn.Module) -> torch.nn.Module:
    """Give batch norms statistics and weights as a training leaves them."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.2)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("make", [lambda: timm.create_model("tf_efficientnet_lite0"), models.resnet18])
def test_folded_norms_are_gone_and_nothing_else_changes(make: Any) -> None:
    network = shake(make())
    pictures = torch.randn(2, 3, 96, 96)

    folded = fold_norms(network, pictures)

    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    other = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        expected = network(other)
        assert torch.allclose(folded(other), expected, atol=1e-3 * float(expected.std()))


def test_a_norm_that_does_not_stand_behind_its_convolution_alone_stays() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            made = self.convolution(pictures)
            return (self.norm(made) + made).mean((2, 3))

    network = shake(Twice())
    assert fold_norms(network, torch.randn(2, 3, 8, 8)) is network
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    assert fold_norms(plain, torch.randn(2, 3, 2, 2)) is plain


def make_sampler(family: str = "sd", attention: str | None = None, **settings: Any) -> DiffusersSampler:
    pipeline = tiny_pipeline(family)
    place_pipeline(pipeline, "cpu", "float32")
    if attention is not None:
        choose_attention(pipeline, attention)
    return DiffusersSampler(pipeline, steps=2, guidance=3.0, **settings)


@pytest.mark.parametrize(
    ("family", "attention"), [("sd", "_native_math"), ("sdxl", "native"), ("flux", "_native_math")]
)
def test_another_attention_draws_the_same(family: str, attention: str) -> None:
    pictures = np.stack(make_sampler(family, attention).sample(PLAN)).astype(int)
    assert np.abs(pictures - np.stack(make_sampler(family).sample(PLAN))).max() <= 1


def test_flux_attends_by_what_was_chosen() -> None:
    pipeline = make_sampler("flux", "_native_math").pipeline
    chosen = {str(each._attention_backend) for each in pipeline.transformer.attn_processors.values()}
    assert len(chosen) == 1
    assert "math" in chosen.pop().lower()


@pytest.mark.parametrize(
    ("family", "attention", "message"),
    [
        ("sd", "sagee", "diffusers has no attention 'sagee', did you mean sage"),
        ("sd", "sage", "the unet of a StableDiffusionPipeline attends by native, _native_math or xformers"),
        ("sd", "xformers", "the attention 'xformers' cannot be used here"),
        ("flux", "sage", "the attention 'sage' cannot be used here"),
    ],
)
def test_an_attention_that_is_not_there_is_told(family: str, attention: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        make_sampler(family, attention)
    assert "\n" not in str(raised.value)


def test_where_compiling_fails_drawing_goes_on_with_one_warning() -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    sampler = make_sampler(compiled=True, lanes=1)
    sampler.pipeline.unet._compiled_call_impl = torch.compile(
        sampler.pipeline.unet._call_impl, backend=refuse, dynamic=False
    )
    with pytest.warns(UserWarning, match="torch.compile does not work here, drawing goes on without") as told:
        drawn = sampler.sample(PLAN)
    assert len([each for each in told if "torch.compile" in str(each.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = sampler.sample(PLAN)
    for pictures in (drawn, again):
        assert all(np.array_equal(a, b) for a, b in zip(pictures, make_sampler().sample(PLAN), strict=True))


@pytest.mark.slow
def test_compiled_networks_draw_the_same() -> None:
    drawn = np.stack(make_sampler(compiled=True, lanes=1).sample(PLAN)).astype(int)
    assert np.abs(drawn - np.stack(make_sampler().sample(PLAN))).max() <= 1

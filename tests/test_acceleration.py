"""What is faster says the same: folded norms, other attention, compiled networks and their fallback."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from diffusers import UNet2DConditionModel
from timm.layers import create_conv2d
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torchvision import models

from t2iprobe.acceleration import (
    choose_attention,
    compile_networks,
    fold_norms,
    fuse_clamps,
    stop_compiling,
    suit_cpu,
)
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


@pytest.mark.parametrize("side", [96, 97, 64])
def test_fused_clamps_are_gone_and_nothing_changes_to_rounding(side: int) -> None:
    """TensorFlow's padding too, at stride 2 on one side for even sizes; 64 is not what it was fused for."""
    network = fold_norms(shake(timm.create_model("tf_efficientnet_lite0")), torch.randn(1, 3, 96, 96))
    network = network.to(torch.bfloat16).to(memory_format=torch.channels_last)
    pictures = torch.randn(3, 3, side, side, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        fused = fuse_clamps(network, pictures if side > 64 else torch.randn(1, 3, 96, 96).bfloat16())
        expected, found = network(pictures).float(), fused(pictures).float()
        exact = network.float()(pictures.float())

    layers = [type(module).__name__ for module in fused.modules()]
    assert "Clamping" in layers
    assert sum(isinstance(module, torch.nn.ReLU6) for module in fused.modules()) == layers.count("Clamping")
    rounding = (expected - exact).abs().mean()
    assert (found - exact).abs().mean() < 1.2 * rounding
    assert (found - expected).abs().mean() < 1.2 * rounding


@pytest.mark.parametrize("size", [(112, 112), (113, 113), (7, 8)])
@pytest.mark.parametrize(("kernel", "stride", "groups"), [(3, 2, 1), (5, 2, 8), (3, 1, 8), (1, 1, 1)])
def test_a_fused_layer_is_its_convolution_and_clamp(
    size: tuple[int, int], kernel: int, stride: int, groups: int
) -> None:
    convolution = create_conv2d(8, 16, kernel, stride=stride, padding="same", groups=groups, bias=True)
    plain = torch.nn.Sequential(convolution, torch.nn.ReLU6()).requires_grad_(False)
    maps = 3 * torch.randn(2, 8, *size)
    with torch.inference_mode():
        fused = fuse_clamps(plain, maps)
        assert type(fused[0]).__name__ == "Clamping"
        assert torch.allclose(fused(maps), plain(maps), atol=1e-5)


def test_what_is_read_between_convolution_and_clamp_is_not_fused() -> None:
    class Twice(torch.nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Conv2d(3, 3, 3, padding=1)
            self.clamp, self.shared = torch.nn.ReLU6(), shared

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            made = 9 * self.first(pictures) if self.shared else self.first(pictures)
            made = self.clamp(self.second(self.clamp(made))) if self.shared else self.clamp(made) + made
            return made.mean((2, 3))

    between, pictures = Twice(False).requires_grad_(False), 9 * torch.randn(2, 3, 8, 8)
    assert fuse_clamps(between, pictures) is between
    shared = Twice(True).requires_grad_(False)
    assert torch.allclose(fuse_clamps(shared, pictures)(pictures), shared(pictures), atol=1e-4)


def suited_unet(linear: bool = False) -> tuple[Any, Any, dict[str, Any]]:
    """Return a plain UNet, the same suited to a CPU, and a guided batch of two pictures."""
    torch.manual_seed(0)
    plain = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
        use_linear_projection=linear,
    )
    plain = plain.requires_grad_(False).to(memory_format=torch.channels_last)
    suited = copy.deepcopy(plain)
    suit_cpu(suited)
    latents = torch.randn(2, plain.config.in_channels, 8, 8)
    prompts = torch.randn(4, 7, plain.config.cross_attention_dim)
    return plain, suited, {"sample": torch.cat([latents, latents]), "encoder_hidden_states": prompts}


def run(unet: Any, batch: dict[str, Any], time: Any = 10) -> torch.Tensor:
    with torch.inference_mode():
        return unet(timestep=torch.tensor(time), **batch).sample


@pytest.mark.parametrize("linear", [False, True])
def test_a_unet_that_suits_the_cpu_says_the_same_of_any_batch(linear: bool) -> None:
    plain, suited, batch = suited_unet(linear)
    for time in (10, 500):
        assert torch.allclose(run(suited, batch, time), run(plain, batch, time), atol=1e-5)
    with torch.inference_mode():
        positional = suited(batch["sample"], 10, batch["encoder_hidden_states"]).sample
        mixed = suited(batch["sample"], timestep=10, encoder_hidden_states=batch["encoder_hidden_states"])
    assert torch.equal(positional, mixed.sample)
    batch["sample"][0, 0, 0, 0] += 1  # the halves are no longer the same
    assert torch.allclose(run(suited, batch), run(plain, batch), atol=1e-5)
    odd = {name: part[:3].clone() for name, part in batch.items()}
    assert torch.allclose(run(suited, odd), run(plain, odd), atol=1e-5)
    batch["sample"] = torch.cat([batch["sample"][2:]] * 2)
    times = [10, 10, 500, 500]  # the halves are the same at another time
    assert torch.allclose(run(suited, batch, times), run(plain, batch, times), atol=1e-5)
    assert torch.allclose(run(copy.deepcopy(suited), batch), run(plain, batch), atol=1e-5)


def test_what_guidances_halves_share_is_computed_once_and_prompts_are_projected_once() -> None:
    _, suited, batch = suited_unet()
    first = suited.down_blocks[0]
    sizes, projected = [], []
    first.resnets[0].conv1.register_forward_hook(lambda _, given, made: sizes.append(len(made)))
    projection = first.attentions[0].transformer_blocks[0].attn2.to_k
    kept = torch.nn.Linear.forward

    def count(layer: Any, tensor: torch.Tensor) -> torch.Tensor:
        projected.extend([1] if layer is projection else [])
        return kept(layer, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", count)
        for time in (500, 300, 10):
            run(suited, batch, time)
    assert sizes == [2, 2, 2]
    assert len(projected) == 1


def test_a_projection_that_was_trained_is_computed_anew() -> None:
    _, suited, batch = suited_unet()
    before = run(suited, batch)
    projection = suited.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    with torch.no_grad():
        projection.weight.mul_(3)
    after = run(suited, batch)
    assert not torch.allclose(before, after)
    batch["encoder_hidden_states"] = batch["encoder_hidden_states"].clone()
    assert torch.equal(run(suited, batch), after)
    copied = copy.deepcopy(suited)
    with torch.no_grad():
        copied.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(0.1)
    assert not torch.allclose(run(copied, batch), after)
    assert torch.equal(run(suited, batch), after)
    given = batch["encoder_hidden_states"].clone().requires_grad_()
    suited(
        timestep=torch.tensor(10), sample=batch["sample"], encoder_hidden_states=given
    ).sample.sum().backward()
    assert given.grad.abs().sum() > 0


@pytest.mark.parametrize("places", [64, 1024])
def test_group_norms_treat_each_picture_alone(places: int) -> None:
    norm = torch.nn.GroupNorm(4, 32)
    network = torch.nn.Sequential(norm)
    side = int(places**0.5)
    maps = torch.randn(5, 32, side, side).to(memory_format=torch.channels_last)
    expected = torch.nn.functional.group_norm(maps, 4, norm.weight, norm.bias)
    suit_cpu(network)

    assert torch.equal(norm(maps)[1:2], norm(maps[1:2]))
    assert torch.allclose(norm(maps), expected, atol=1e-5)
    assert norm(maps).is_contiguous(memory_format=torch.channels_last)


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


def test_where_compiling_fails_drawing_goes_on_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=refuse, dynamic=False))
    sampler = make_sampler(compiled=True, lanes=1)
    with pytest.warns(UserWarning, match="torch.compile does not work here, drawing goes on without") as told:
        drawn = sampler.sample(PLAN)
    assert len([each for each in told if "torch.compile" in str(each.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = sampler.sample(PLAN)
    for pictures in (drawn, again):
        assert all(np.array_equal(a, b) for a, b in zip(pictures, make_sampler().sample(PLAN), strict=True))


def test_an_offloaded_network_is_offloaded_again_where_compiling_fails() -> None:
    pipeline = tiny_pipeline("sd")
    calls = []
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda *given, **named: calls.append(1) or forward(*given, **named)
    hooked = pipeline.unet.forward
    compile_networks(pipeline)
    assert pipeline.unet.forward is not hooked
    with pytest.warns(UserWarning, match="drawing goes on without: no compiler"):
        stop_compiling(pipeline, RuntimeError("no compiler"))
    assert pipeline.unet.forward is hooked


def test_lanes_compile_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager"))
    plain, suited, batch = suited_unet()
    compile_networks(SimpleNamespace(unet=suited))
    counters.clear()
    expected = {time: run(plain, batch, time) for time in (10, 300, 500)}

    def work(_: int) -> list[torch.Tensor]:
        own = {name: part.clone() for name, part in batch.items()}
        return [run(suited, own, time) for time in expected]

    with ThreadPoolExecutor(3) as pool:
        drawn = list(pool.map(work, range(12)))
    for made in drawn:
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(made, expected.values(), strict=True))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compiled_networks_draw_the_same() -> None:
    drawn = np.stack(make_sampler(compiled=True, lanes=1).sample(PLAN)).astype(int)
    assert np.abs(drawn - np.stack(make_sampler().sample(PLAN))).max() <= 1


@pytest.mark.slow
def test_a_compiled_unet_shares_halves_keeps_projections_and_takes_any_batch() -> None:
    plain, suited, batch = suited_unet()
    compile_networks(SimpleNamespace(unet=suited))
    counters.clear()
    assert torch.allclose(run(suited, batch), run(plain, batch), atol=1e-4)
    lone = torch.randn(3, plain.config.in_channels, 8, 8)
    larger = {"sample": torch.cat([lone, lone]), "encoder_hidden_states": torch.randn(6, 7, 32)}
    assert torch.allclose(run(suited, larger), run(plain, larger), atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        run(suited, larger, 500)
    called = {event.key: event.count for event in watched.key_averages()}
    assert "mkldnn::_convolution_pointwise" in called  # with weights that were laid out once
    assert "aten::mkldnn_convolution" not in called

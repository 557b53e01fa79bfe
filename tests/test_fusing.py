"""A judge says the same with folded norms and fused clamps."""

from typing import Any

import pytest
import timm
import torch
from timm.layers import create_conv2d
from torchvision import models

from t2iprobe.fusing import fold_norms, fuse_clamps


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

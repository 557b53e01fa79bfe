"""A UNet that suits a CPU says what the plain one does, of any batch, after any change."""

import copy
from typing import Any

import pytest
import torch
from small_networks import run, suited_unet

from t2iprobe.cpu_layers import suit_cpu


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

"""Checkpoints of all families, by the names and in the form in which their models hold them."""

from pathlib import Path

import decoder_toys as toys
import pytest
import torch
from safetensors.torch import load_file

from t2iprobe.errors import UserError
from t2iprobe.llm.models import layers_name
from t2iprobe.llm.naming import Naming


def save_toy(family: str, folder: Path) -> tuple[Naming, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A naming, the tensors of the model's checkpoint and those of the model."""
    model = toys.tiny_model(family, torch.float32)
    model.save_pretrained(folder)
    return Naming(model, layers_name(model)), load_file(folder / "model.safetensors"), model.state_dict()


@pytest.mark.parametrize("family", [*toys.FAMILIES, *toys.AWKWARD])
def test_a_checkpoint_becomes_what_the_model_holds(family, tmp_path):
    naming, stored, held = save_toy(family, tmp_path)
    found = naming.convert(stored)
    assert found.keys() <= held.keys()
    assert all(torch.equal(found[name], held[name]) for name in found)
    tied = {name for name in held if "lm_head" in name}
    assert held.keys() - found.keys() <= tied
    assert naming.convert(held).keys() == held.keys()  # what has its name keeps it


@pytest.mark.parametrize("family", ["qwen3 with experts", "mixtral"])
def test_a_layers_experts_are_merged_in_their_order(family, tmp_path):
    naming, stored, held = save_toy(family, tmp_path)
    layer = {name: each for name, each in reversed(stored.items()) if name.startswith("model.layers.1.")}
    assert len(layer) > len(found := naming.convert_layer(1, layer))
    assert torch.equal(found["mlp.experts.down_proj"], held["model.layers.1.mlp.experts.down_proj"])
    lost = [name for name in layer if ".experts.2." in name]
    for names, told in (
        (lost[:1], "layer 1 cannot be put together: Sizes of tensors must match"),
        (
            lost,
            r"hold model\.layers\.1\.mlp\.experts\.down_proj, .*experts\.gate_up_proj, which \w+ models",
        ),
    ):
        with pytest.raises(UserError, match=told):
            naming.convert_layer(1, {name: each for name, each in layer.items() if name not in names})


def test_a_layer_is_whole_and_no_more(tmp_path):
    naming, stored, _ = save_toy("gemma4", tmp_path)
    start = "model.layers.2."
    layer = {name: each for name, each in stored.items() if name.startswith(start)}
    assert "layer_scalar" in naming.convert_layer(2, layer)
    without = {name: each for name, each in layer.items() if name != f"{start}layer_scalar"}
    with pytest.raises(UserError, match=r"lack model\.layers\.2\.layer_scalar$"):
        naming.convert_layer(2, without)
    scales = {f"{start}mlp.up_proj.weight_scale": torch.ones(1)}
    with pytest.raises(
        UserError, match=r"hold model\.layers\.2\.mlp\.up_proj\.weight_scale, which gemma4_text"
    ):
        naming.convert_layer(2, layer | scales)
    with pytest.raises(UserError, match=r"lack .*layer_scalar and hold .*weight_scale"):
        naming.convert_layer(2, without | scales)
    with pytest.raises(UserError, match="no place for"):
        naming.convert_layer(3, layer)


def test_what_transformers_ignores_is_ignored(tmp_path):
    naming, _, _ = save_toy("gemma4 with shared keys", tmp_path)
    name = "model.layers.{}.self_attn.k_proj.weight"
    assert naming.ignores(name.format(3))  # of a layer that has others' keys
    assert not naming.ignores(name.format(1))
    assert not naming.ignores("model.layers.3.scale")

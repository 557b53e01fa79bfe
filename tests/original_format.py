"""Write a diffusers Stable Diffusion pipeline as one file with the names of the original code: for tests."""

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(pipeline: Any, path: Path) -> None:
    """Save UNet, VAE and text encoder under the original names in one safetensors file."""
    blocks, layers = len(pipeline.unet.config.block_out_channels), pipeline.unet.config.layers_per_block
    weights = {
        f"model.diffusion_model.{_name_unet(name, layers)}": value
        for name, value in pipeline.unet.state_dict().items()
    }
    for name, value in pipeline.vae.state_dict().items():
        renamed = _name_vae(name, blocks)
        is_projection = ".attn_1." in renamed and value.ndim == 2  # a convolution of 1 × 1 there
        weights[f"first_stage_model.{renamed}"] = value[:, :, None, None] if is_projection else value
    for name, value in pipeline.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name}"] = value
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, path)


def _name_unet(name: str, layers: int) -> str:
    module, _, parameter = name.rpartition(".")
    if module in UNET:
        return f"{UNET[module]}.{parameter}"
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        side, block, kind, layer, rest = match.groups()
        number = (layers + 1) * int(block) + int(layer) + (side == "down")
        place = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}"
        return f"{place}.{_name_resnet(rest) if kind == 'resnets' else rest}"
    if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", name):
        return f"input_blocks.{(layers + 1) * (int(match[1]) + 1)}.0.op.{match[2]}"
    if match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", name):
        return f"output_blocks.{(layers + 1) * int(match[1]) + layers}.2.conv.{match[2]}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        if match[1] == "attentions":
            return f"middle_block.1.{match[3]}"
        return f"middle_block.{2 * int(match[2])}.{_name_resnet(match[3])}"
    raise ValueError(name)


def _name_resnet(rest: str) -> str:
    module, _, parameter = rest.rpartition(".")
    return f"{RESNET[module]}.{parameter}"


def _name_vae(name: str, blocks: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        module, _, parameter = name.partition("mid_block.attentions.0.")[2].rpartition(".")
        return f"{name.partition('mid_block')[0]}mid.attn_1.{ATTENTION[module]}.{parameter}"
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")

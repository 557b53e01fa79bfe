"""A small UNet as it is and suited to a CPU, and samplers of tiny pipelines."""

import copy
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from t2iprobe.attention import choose_attention
from t2iprobe.cpu_layers import suit_cpu
from t2iprobe.hypernymy.sampling import DiffusersSampler
from t2iprobe.pipelines import place_pipeline
from t2iprobe.runs import build_plan
from t2iprobe.testing import tiny_pipeline

PLAN = build_plan([{"samples": 4, "prompts": {"dog.n.01": {"base": "a dog"}}}], 0)


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


def make_sampler(family: str = "sd", attention: str | None = None, **settings: Any) -> DiffusersSampler:
    pipeline = tiny_pipeline(family)
    place_pipeline(pipeline, "cpu", "float32")
    if attention is not None:
        choose_attention(pipeline, attention)
    return DiffusersSampler(pipeline, steps=2, guidance=3.0, **settings)

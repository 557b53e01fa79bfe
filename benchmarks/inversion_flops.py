"""The FLOPs of a training step at the sizes of SD 1.5 and SDXL, counted on tensors without content.

python benchmarks/inversion.py --flops
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from published_inversion import METHOD, PublishedDVAR, Stock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from t2iprobe.inversion.methods import TextualInversion
from t2iprobe.inversion.settings import Training
from t2iprobe.inversion.stopping import PRESETS


def count(run: Callable[[], Any]) -> int:
    """Return the FLOPs of the matrix products and convolutions in `run`: 2 for multiplying and adding.

    Attention is counted as plain products: not every fused kernel is known to the counter.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def count_parts(size: str) -> dict[str, float]:
    """Return the FLOPs of a model's parts for one item, on tensors without content; `size` of SIZES."""
    with torch.device("meta"):
        parts, pictures = SIZES[size]()
        unet, vae, encoders = parts
        for module in (unet, vae, *encoders):
            module.requires_grad_(False).eval()
        width = unet.config.cross_attention_dim
        latents = torch.randn(1, 4, pictures // 8, pictures // 8)
        times, ids = torch.zeros(1), torch.zeros(1, 77, dtype=torch.long)
        added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.zeros(1, 6)}

        def denoise(context: torch.Tensor) -> torch.Tensor:
            return unet(latents, times, context, added_cond_kwargs=added).sample

        def encode() -> torch.Tensor:
            return sum(encoder(ids)[0].sum() for encoder in encoders)

        with torch.no_grad():
            found: dict[str, float] = {
                "encode a picture": count(lambda: vae.encode(torch.randn(1, 3, pictures, pictures))),
                "denoise": count(lambda: denoise(torch.randn(1, 77, width))),
                "encode a text": count(encode),
            }
        context = torch.randn(1, 77, width, requires_grad=True)
        found["denoise, gradient to the text"] = count(lambda: denoise(context).sum().backward())
        for encoder in encoders:
            encoder.get_input_embeddings().requires_grad_(True)
        found["encode a text, gradient to the rows"] = count(lambda: encode().backward())
    return found


def make_sd15() -> tuple[tuple[Any, Any, list[Any]], int]:
    """Return SD 1.5's denoiser, autoencoder and text encoders without weights, and its pictures' side."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet: Any = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return (unet, make_autoencoder(), [CLIPTextModel(clip_config())]), 512


def make_sdxl() -> tuple[tuple[Any, Any, list[Any]], int]:
    """Return SDXL's denoiser, autoencoder and text encoders without weights, and its pictures' side."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet: Any = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    large = clip_config(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        projection_dim=1280,
    )
    return (
        unet,
        make_autoencoder(),
        [CLIPTextModel(clip_config()), CLIPTextModelWithProjection(large)],
    ), 1024


def make_autoencoder() -> Any:
    """Return the autoencoder of SD and SDXL."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )


def clip_config(**more: Any) -> Any:
    """Return the configuration of CLIP ViT-L's text encoder, or one like it."""
    from transformers import CLIPTextConfig

    large = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    return CLIPTextConfig(**(large | more))


SIZES = {"SD 1.5, 512²": make_sd15, "SDXL, 1024²": make_sdxl}


def list_procedures() -> dict[str, tuple[int, bool, int, int]]:
    """Return procedure → batch, whether each step encodes pictures, watched items, steps between looks."""
    ours, every = Training(), PRESETS[METHOD]["plateau"]["every"]
    dvar = (PublishedDVAR.batch, PublishedDVAR.watched)
    return {
        "diffusers' example": (Stock.batch, True, 0, 1),
        "published DVAR": (dvar[0], True, dvar[1], 1),
        "… moments cached": (dvar[0], False, dvar[1], 1),
        "… and a look every 5": (dvar[0], False, dvar[1], 5),
        "… or every 10": (dvar[0], False, dvar[1], 10),
        "ours": (TextualInversion.batch, False, ours.items, every),
    }


def cost_step(parts: Mapping[str, float], batch: int, encodes: bool, items: int, every: int) -> float:
    """Return the FLOPs of a training step with its share of the looks."""
    train = parts["denoise, gradient to the text"] + parts["encode a text, gradient to the rows"]
    look = parts["denoise"] + parts["encode a text"]
    return batch * (train + encodes * parts["encode a picture"]) + items / every * look


def table_flops(counted: Mapping[str, Mapping[str, float]]) -> str:
    """Return the Markdown tables of parts and of procedures."""
    lines = ["| GFLOP, one item | " + " | ".join(counted) + " |", "|---" * (1 + len(counted)) + "|"]
    for part in next(iter(counted.values())):
        lines.append(
            f"| {part} | " + " | ".join(f"{parts[part] / 1e9:.1f}" for parts in counted.values()) + " |"
        )
    head = " | ".join(f"{size}: TFLOP a step | a picture trained on" for size in counted)
    lines += ["", f"| procedure | batch | watched | {head} |", "|---" * (3 + 2 * len(counted)) + "|"]
    for name, (batch, encodes, items, every) in list_procedures().items():
        costs = [cost_step(parts, batch, encodes, items, every) / 1e12 for parts in counted.values()]
        watched = f"{items} every {every}" if items else "–"
        cells = " | ".join(f"{cost:.2f} | {cost / batch:.2f}" for cost in costs)
        lines.append(f"| {name} | {batch} | {watched} | {cells} |")
    return "\n".join(lines)

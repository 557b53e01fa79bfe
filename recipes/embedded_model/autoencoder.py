"""Train the autoencoder: 64-pixel pictures to 8x8 latents of 24 channels and back.

Loss: L1 at three scales, gradients, a small KL, and the features of the ImageNet classifier at the
resolution at which it judges. Latents get noise before they are decoded, so that the decoder forgives what
the denoiser does not get exactly.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from judge import load_judge, upsample
from sources import WORK
from speed import autocast, speed_up_group_norm
from torch import Tensor, nn

LATENT_CHANNELS = 24
FEATURE_LAYERS = (1, 2, 3, 4, 5, 6)


def build_autoencoder() -> AutoencoderKL:
    """The untrained network (3.5M parameters). No attention: everything is convolution."""
    widths = (16, 32, 128, 128)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def random_views(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Views [B, 3, 64, 64] in [-1, 1] of uint8 pictures [B, 3, 96, 96]: flip, zoom, shift, a few degrees;
    white outside.
    """
    count = len(pictures)
    scale = torch.empty(count).uniform_(0.9, 1.15, generator=generator)
    angle = torch.empty(count).normal_(0, 0.06, generator=generator)
    shift = torch.empty(count, 2).uniform_(-0.06, 0.06, generator=generator)
    flip = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
    exact = torch.rand(count, generator=generator) < 0.4
    scale, angle, shift = (
        scale.masked_fill(exact, 1),
        angle.masked_fill(exact, 0),
        shift.masked_fill(exact[:, None], 0),
    )
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([flip * cos, -sin, shift[:, 0]], 1), torch.stack([flip * sin, cos, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 3, 128, 128], align_corners=False)
    # ink, not light, is sampled: the zero padding outside the picture is then white
    sampled = F.grid_sample(2 - pictures.float() / 127.5, grid, mode="bicubic", align_corners=False)
    return 1 - F.avg_pool2d(sampled, 2).clamp(0, 2)


def features(judge: nn.Module, pictures: Tensor, size: int) -> list[Tensor]:
    """The judge's activations after FEATURE_LAYERS stages and after its head, for pictures [B, 3, H, W] in
    [-1, 1].
    """
    x = judge.bn1(judge.conv_stem(upsample(pictures, size).contiguous(memory_format=torch.channels_last)))
    found = []
    for index, block in enumerate(judge.blocks):
        x = block(x)
        if index in FEATURE_LAYERS:
            found.append(x)
    found.append(judge.bn2(judge.conv_head(x)).mean((2, 3)))
    return found


def perceptual_loss(judge: nn.Module, made: Tensor, real: Tensor, size: int) -> Tensor:
    """Mean over layers of the squared distance of activations, relative to their variance over the batch
    (scalar).
    """
    with torch.no_grad():
        targets = features(judge, real, size)
    losses = [
        (a.float() - b.float()).square().mean() / b.float().var()
        for a, b in zip(features(judge, made, size), targets, strict=True)
    ]
    return torch.stack(losses).mean()


def picture_loss(made: Tensor, real: Tensor) -> Tensor:
    """L1 at full, half and quarter size, plus L1 of the horizontal and vertical differences (scalar)."""
    loss = (made - real).abs().mean()
    for factor in (2, 4):
        loss = loss + 0.5 * (F.avg_pool2d(made, factor) - F.avg_pool2d(real, factor)).abs().mean()
    difference = made - real
    return loss + 0.5 * (difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean())


def train_autoencoder(
    pictures: dict, out: Path, *, steps: int, batch: int = 8, seed: int = 0, device: str = "cpu"
) -> None:
    """Train for `steps` and leave `out` (weights, EMA weights, optimiser, step); continues from it if it is
    there.
    """
    place = torch.device(device)
    torch.manual_seed(seed)
    vae = speed_up_group_norm(build_autoencoder().to(place, memory_format=torch.channels_last))
    average = copy.deepcopy(vae)
    judge = load_judge(0).to(place)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    step = 0
    if out.exists():
        state = torch.load(out, weights_only=True)
        vae.load_state_dict(state["raw"]), average.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    labels = pictures["labels"]
    weight = torch.tensor([1 / labels.count(label) ** 0.5 for label in labels])
    wide = len(pictures["pool"])
    started, start_step, shown = time.time(), step, torch.zeros(4)
    while step < steps:
        generator = torch.Generator().manual_seed(seed * 10_000_019 + step)
        progress = step / steps
        rate = 1e-3 * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.multinomial(weight, batch * 3 // 4, replacement=True, generator=generator)
        others = torch.randint(0, wide, (batch // 4,), generator=generator)
        real = random_views(torch.cat([pictures["P"][chosen], pictures["pool"][others]]), generator).to(place)
        real = real.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(batch, LATENT_CHANNELS, 8, 8, generator=generator).to(place)
        level = torch.rand(batch, 1, 1, 1, generator=generator).to(place) * 0.25
        with autocast(place):
            posterior = vae.encode(real).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            latents = mean + noise * (logvar.mul(0.5).exp() + level * mean.detach().std())
            made = vae.decode(latents).sample.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        pixel = picture_loss(made, real)
        size = 224 if progress > 0.8 else 160
        half = slice(0, batch * 3 // 4) if progress > 0.8 else slice(batch // 4, batch * 3 // 4)
        with autocast(place):
            seen = perceptual_loss(judge, made[half], real[half], size)
        loss = pixel + 5e-4 * kl + (0.15 + 0.65 * progress) * seen
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            decay = min(0.999, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), 1 - decay)
        shown += torch.tensor([pixel.item(), kl.item(), seen.item(), 1])
        if step % 100 == 0:
            values = (shown[:3] / shown[3]).tolist()
            shown.zero_()
            speed = (step - start_step) * batch / (time.time() - started)
            print(
                f"{step}/{steps} pixel {values[0]:.4f} kl {values[1]:.2f} seen {values[2]:.4f} {speed:.0f}/s",
                flush=True,
            )
        if step % 250 == 0 or step == steps:
            state = {
                "raw": vae.state_dict(),
                "ema": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
            }
            torch.save(state, out.with_suffix(".tmp"))
            out.with_suffix(".tmp").rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--steps", type=int, default=9600)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    pictures = torch.load(options.work / "pictures.pt", weights_only=True)
    train_autoencoder(pictures, options.work / "autoencoder.pt", steps=options.steps, device=options.device)

"""Polish the decoder alone: the latents stay as they are, so that the denoiser trained on them stays valid.

The decoder sees latents with noise, as the denoiser leaves them, and the features of the classifier weigh
more than in the first training, at the resolution at which it judges.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from autoencoder import build_autoencoder, perceptual_loss, picture_loss, random_views
from judge import load_judge
from sources import WORK
from speed import autocast, speed_up_group_norm
from torch import nn


def polish_decoder(
    pictures: dict, work: Path, *, steps: int, batch: int = 8, seed: int = 1, device: str = "cpu"
) -> None:
    """Train the decoder of `work/vae.pt` for `steps` and write `work/vae_polished.pt`.

    Continues from `work/polish.pt` if it is there.
    """
    place, state_file = torch.device(device), work / "polish.pt"
    vae = build_autoencoder()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
    vae = speed_up_group_norm(vae.to(place, memory_format=torch.channels_last)).requires_grad_(False)
    trained = nn.ModuleList([vae.decoder, vae.post_quant_conv]).requires_grad_(True)
    average = copy.deepcopy(trained)
    judge = load_judge(0).to(place)
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=5e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        trained.load_state_dict(state["raw"]), average.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    labels = pictures["labels"]
    weight = torch.tensor([1 / labels.count(label) ** 0.5 for label in labels])
    started, start_step, shown = time.time(), step, torch.zeros(2)
    while step < steps:
        generator = torch.Generator().manual_seed(seed * 10_000_019 + step)
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.multinomial(weight, batch * 7 // 8, replacement=True, generator=generator)
        others = torch.randint(0, len(pictures["pool"]), (batch - len(chosen),), generator=generator)
        real = random_views(torch.cat([pictures["P"][chosen], pictures["pool"][others]]), generator).to(place)
        real = real.contiguous(memory_format=torch.channels_last)
        level = torch.rand(batch, 1, 1, 1, generator=generator).square() * 0.25
        with autocast(place):
            with torch.no_grad():
                latents = vae.encode(real).latent_dist.mean.float()
            noise = torch.randn(latents.shape, generator=generator) * level
            made = vae.decode(latents + noise.to(place)).sample.float()
            seen = perceptual_loss(judge, made, real, 224)
        pixel = picture_loss(made, real)
        optimizer.zero_grad(set_to_none=True)
        (pixel + 0.8 * seen).backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            decay = min(0.99, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - decay)
        shown += torch.tensor([pixel.item(), seen.item()])
        if step % 50 == 0:
            speed = (step - start_step) * batch / (time.time() - started)
            print(
                f"{step}/{steps} pixel {shown[0] / 50:.4f} seen {shown[1] / 50:.4f} {speed:.0f}/s", flush=True
            )
            shown.zero_()
        if step % 200 == 0 or step == steps:
            state = {
                "raw": trained.state_dict(),
                "ema": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
            }
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").rename(state_file)
    trained.load_state_dict(average.state_dict())
    torch.save(vae.state_dict(), work / "vae_polished.tmp")
    (work / "vae_polished.tmp").rename(work / "vae_polished.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    stored = torch.load(options.work / "pictures.pt", weights_only=True)
    polish_decoder(stored, options.work, steps=options.steps, device=options.device)

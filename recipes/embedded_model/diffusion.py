"""Train the text encoder and the UNet on the autoencoder's latents (v-prediction, zero terminal SNR)."""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from autoencoder import LATENT_CHANNELS, build_autoencoder, random_views
from captions import MAX_TOKENS, train_tokenizer, write_caption
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from sources import WORK
from speed import autocast, speed_up_group_norm
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 192
# Of a picture: as it is, mirrored, two random views.
VIEW_WEIGHTS = (5, 3, 1, 1)
VIEWS = len(VIEW_WEIGHTS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder: two layers of 192, 32 tokens."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    # CLIP's own .02 drowns in what the layers add: after 4,000 steps the 156 words spanned nine dimensions
    nn.init.normal_(encoder.get_input_embeddings().weight, std=1.5)
    return encoder


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet of 11M parameters on latents [24, 8, 8]. `attention_head_dim` is the number of heads
    here.
    """
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(128, 192),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_scheduler() -> DDIMScheduler:
    """DDIM with trailing spacing from pure noise (zero terminal SNR), predicting v."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


@torch.no_grad()
def encode_views(vae: AutoencoderKL, pictures: dict, seed: int) -> Tensor:
    """Posterior means [VIEWS, N, 24, 8, 8] of each picture: as it is, mirrored, and random views."""
    generator = torch.Generator().manual_seed(seed)
    exact = pictures["P64"].float() / 127.5 - 1
    views = [exact, exact.flip(-1)] + [random_views(pictures["P"], generator) for _ in range(VIEWS - 2)]
    return torch.stack(
        [torch.cat([vae.encode(part).latent_dist.mean for part in view.split(32)]) for view in views]
    )


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Fold the latents' mean and standard deviation by channel into the two 1x1 convolutions around them.

    Returns `latents` as the changed autoencoder would give them: zero mean, unit variance, so that
    `scaling_factor` is 1.
    """
    mean, std = latents.mean((0, 1, 3, 4)), latents.std((0, 1, 3, 4))
    before, after = vae.quant_conv, vae.post_quant_conv
    after.bias += (after.weight[:, :, 0, 0] @ mean).to(after.bias)
    after.weight *= std[None, :, None, None]
    before.weight[: len(mean)] /= std[:, None, None, None]
    before.bias[: len(mean)] = (before.bias[: len(mean)] - mean) / std
    before.bias[len(mean) :] -= 2 * std.log()
    return (latents - mean[:, None, None]) / std[:, None, None]


def load_autoencoder(path: Path) -> AutoencoderKL:
    """The trained autoencoder's averaged weights."""
    vae = build_autoencoder()
    vae.load_state_dict(torch.load(path, weights_only=True)["ema"])
    return vae.eval().requires_grad_(False)


def train_diffusion(
    pictures: dict, work: Path, *, steps: int, batch: int = 16, seed: int = 0, device: str = "cpu"
) -> None:
    """Train for `steps` and leave `work/diffusion.pt`; continues from it if it is there."""
    place, out = torch.device(device), work / "diffusion.pt"
    torch.manual_seed(seed)
    labels = pictures["labels"]
    synsets = sorted(set(labels))
    members = [[i for i, label in enumerate(labels) if label == synset] for synset in synsets]
    # Learned once: ties between merges fall differently in each call, and the rows of its tokens are trained.
    if (work / "tokenizer" / "tokenizer.json").exists():
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    else:
        tokenizer = train_tokenizer(synsets, work / "tokenizer", seed)
    vae = load_autoencoder(work / "autoencoder.pt")
    latents = normalise_latents(vae, encode_views(vae, pictures, seed)).to(place)
    torch.save(vae.state_dict(), work / "vae.pt")
    model = nn.ModuleDict({"unet": build_unet(), "text": build_text_encoder(tokenizer)})
    model = speed_up_group_norm(model.to(place, memory_format=torch.channels_last))
    # plain attention has the faster backward at 64 tokens; the weights are the same
    model["unet"].set_attn_processor(AttnProcessor())
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    step = 0
    if out.exists():
        state = torch.load(out, weights_only=True)
        model.load_state_dict(state["raw"]), average.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    alphas = build_scheduler().alphas_cumprod.to(place)
    started, start_step, shown = time.time(), step, 0.0
    while step < steps:
        rng, generator = (
            random.Random(seed * 10_000_019 + step),
            torch.Generator().manual_seed(seed * 10_000_019 + step),
        )
        rate = 9e-4 * min(1, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = [rng.choice(members[rng.randrange(len(members))]) for _ in range(batch)]
        captions = ["" if rng.random() < 0.1 else write_caption(labels[i], rng) for i in chosen]
        views = rng.choices(range(VIEWS), VIEW_WEIGHTS, k=batch)
        clean = latents[views, chosen]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(
            place
        )
        # stratified: one timestep from each of `batch` equal slices, in random order
        slices = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
        timesteps = (slices * len(alphas)).long().clamp(0, len(alphas) - 1).to(place)
        noise = torch.randn(clean.shape, generator=generator).to(place)
        signal = alphas[timesteps].sqrt()[:, None, None, None]
        rest = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
        noisy, target = signal * clean + rest * noise, signal * noise - rest * clean
        with autocast(place):
            context = model["text"](tokens).last_hidden_state
            made = model["unet"](
                noisy.contiguous(memory_format=torch.channels_last), timesteps, context
            ).sample
        loss = F.mse_loss(made.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            decay = min(0.999, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        shown += loss.item()
        if step % 100 == 0:
            speed = (step - start_step) * batch / (time.time() - started)
            print(f"{step}/{steps} loss {shown / 100:.4f}  {speed:.0f} pictures/s", flush=True)
            shown = 0.0
        if step % 500 == 0 or step == steps:
            state = {
                "raw": model.state_dict(),
                "ema": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
            }
            torch.save(state, out.with_suffix(".tmp"))
            out.with_suffix(".tmp").rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    train_diffusion(
        torch.load(options.work / "pictures.pt", weights_only=True),
        options.work,
        steps=options.steps,
        device=options.device,
    )

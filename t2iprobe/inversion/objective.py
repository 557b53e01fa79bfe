"""The denoising loss: sampled anew at each training step, or on inputs that stay fixed, to be watched.

The deterministic objective is that of "Is This Loss Informative?" (arXiv 2302.04841, §3): the same pictures,
latents, noise, captions and timesteps at every look, so that nothing but the learner changes it.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from t2iprobe.errors import UserError
from t2iprobe.inversion.backbones import Backbone
from t2iprobe.inversion.concepts import Concept, Moments

#: What an input is made of, in the order of the published five-letter code ("11111": all fixed).
PARTS = ("images", "latents", "noise", "captions", "timesteps")


@dataclass(frozen=True)
class Inputs:
    """What `b` losses are made of: indices, flips, quantiles [b]; two normals [b, c, h, w]; captions."""

    pictures: torch.Tensor
    flips: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor
    captions: list[str]
    quantiles: torch.Tensor


def draw_inputs(
    concept: Concept,
    shape: Sequence[int],
    items: int,
    key: Sequence[object],
    *,
    stratified: bool = True,
    flip: bool = True,
) -> Inputs:
    """Draw the inputs of `items` losses; the same `key` gives the same, on any device and in any batch.

    Stratified, one quantile of time lies in each of `items` equal parts, in random order, and the pictures
    are taken in turn.

    Args:
        concept: its pictures and captions.
        shape: of a latent, [c, h, w].
        items: how many.
        key: seed, token, step and the like.
        stratified: else quantiles and pictures are independent and uniform.
        flip: mirror half of the pictures.
    """
    generator, rng = make_generator(*key), random.Random("/".join(map(str, key)))
    count = len(concept.pictures)
    if stratified:
        parts = torch.randperm(items, generator=generator)
        quantiles = (parts + torch.rand(items, generator=generator)) / items
        start = rng.randrange(count)
        order = torch.tensor(rng.sample(range(count), count))
        pictures = order[(start + torch.arange(items)) % count]
    else:
        quantiles = torch.rand(items, generator=generator)
        pictures = torch.randint(count, (items,), generator=generator)
    flips = torch.randint(2, (items,), generator=generator) * int(flip)
    return Inputs(
        pictures=pictures,
        flips=flips,
        latents=torch.randn(items, *shape, generator=generator),
        noise=torch.randn(items, *shape, generator=generator),
        captions=[concept.caption(int(picture), rng) for picture in pictures],
        quantiles=quantiles,
    )


def make_generator(*key: object) -> torch.Generator:
    """Return a generator on the CPU, seeded by the hash of `key`."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class FixedInputs:
    """The inputs of the watched loss. `code` has a 1 for each of PARTS that stays fixed, a 0 for one redrawn.

    Captions are of the pictures they are drawn for: where pictures are redrawn and captions fixed (or the
    other way round), a caption file's text may stand by another picture, as in the published ablation.
    """

    def __init__(
        self,
        concept: Concept,
        shape: Sequence[int],
        items: int,
        seed: int,
        *,
        code: str = "11111",
        stratified: bool = True,
        flip: bool = True,
    ) -> None:
        if len(code) != len(PARTS) or set(code) - set("01"):
            raise UserError(f"the code of fixed parts is five of 0 and 1 ({', '.join(PARTS)}), not {code!r}")
        self._redrawn = {part for part, bit in zip(PARTS, code, strict=True) if bit == "0"}
        self._draw = lambda *key: draw_inputs(
            concept, shape, items, (seed, concept.token, *key), stratified=stratified, flip=flip
        )
        self._fixed = self._draw("fixed")

    def at(self, step: int) -> Inputs:
        """Return the inputs of the look after `step` training steps."""
        if not self._redrawn:
            return self._fixed
        fresh = self._draw("look", step)
        taken: dict[str, Any] = {}
        for part in self._redrawn:
            names = {"images": ("pictures", "flips"), "timesteps": ("quantiles",)}.get(part, (part,))
            taken |= {name: getattr(fresh, name) for name in names}
        return replace(self._fixed, **taken)


def denoising_losses(
    backbone: Backbone, moments: Sequence[Moments], inputs: Sequence[Inputs], prompts: Sequence[str]
) -> torch.Tensor:
    """Return the denoiser's squared error, a mean over each latent: float32 [Σ items], concept by concept.

    Args:
        backbone: the model.
        moments: of each concept, on the backbone's device.
        inputs: of each concept.
        prompts: all captions, with the tokens' vectors written out.
    """
    device = backbone.device
    clean = torch.cat(
        [
            m.sample(i.pictures.to(device), i.flips.to(device), i.latents.to(device))
            for m, i in zip(moments, inputs, strict=True)
        ]
    )
    noise = torch.cat([i.noise for i in inputs]).to(device)
    times = backbone.noise.times(torch.cat([i.quantiles for i in inputs])).to(device)
    noisy, target = backbone.noise.mix(clean, noise, times)
    conditioning = backbone.encode(prompts)
    with backbone.context():
        made = backbone.predict(noisy, times, conditioning)
    # float32, whatever the network computes in: what is learned can be half a percent of the loss
    return (made.float() - target.float()).square().mean((1, 2, 3))

"""Two published procedures of textual inversion, written anew from what they do, to be compared with ours.

Their rates were made for Stable Diffusion, whose vocabulary has a root mean square of .014, and are scaled to
that of the model at hand.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch

from t2iprobe.inversion.backbones import Backbone
from t2iprobe.inversion.concepts import Concept
from t2iprobe.inversion.embeddings import Rows
from t2iprobe.inversion.methods import TextualInversion
from t2iprobe.inversion.objective import make_generator
from t2iprobe.inversion.stopping import make_stopper

METHOD = "textual-inversion"
SD_RMS = 0.014  # of the vocabulary's entries


class Reference:
    """A procedure that trains one concept from a word on, a step at a time."""

    batch: ClassVar[int]
    most: ClassVar[int]
    rate: ClassVar[float]  # for entries of SD_RMS
    decay: ClassVar[float] = 1e-2

    def __init__(self, backbone: Backbone, concept: Concept, word: str, seed: int) -> None:
        self.backbone, self.concept, self.seed = backbone, concept, seed
        ((self.tokenizer, self.encoder),) = backbone.encoders.values()
        self.encoder.float()
        self.pixels = (concept.pictures.float() / 127.5 - 1).to(backbone.device)
        self.done = 0
        self.reason = ""
        self._epoch: tuple[int, list[int]] = (-1, [])
        scale = float(self.encoder.get_input_embeddings().weight.square().mean().sqrt()) / SD_RMS
        self.parameter = self.place(word)
        # a step decays by rate × decay, which stays what it was
        self.optimizer = torch.optim.AdamW(
            [self.parameter], lr=self.rate * scale, weight_decay=self.decay / scale
        )

    def place(self, word: str) -> torch.nn.Parameter:
        """Put the token into the model. Returns what trains."""
        raise NotImplementedError

    def row(self) -> torch.Tensor:
        """Return the token's row [1, d]."""
        raise NotImplementedError

    def caption(self, item: int) -> str:
        """Return the caption of an item of the data set."""
        raise NotImplementedError

    def watch(self) -> None:
        """What is done between backward and the optimiser's step."""

    def restore_others(self) -> None:
        """What is done after the optimiser's step."""

    def choose(self) -> list[int]:
        """Return the step's items of a data set that lists each picture 100 times, shuffled at each epoch."""
        size = 100 * len(self.pixels)
        found = []
        for place in range(self.done * self.batch, (self.done + 1) * self.batch):
            epoch, index = divmod(place, size)
            if self._epoch[0] != epoch:
                generator = make_generator(self.seed, self.concept.token, "epoch", epoch)
                self._epoch = (epoch, torch.randperm(size, generator=generator).tolist())
            found.append(self._epoch[1][index])
        return found

    @torch.no_grad()
    def encode_pictures(self, items: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Return latents [b, c, h, w] of the items' pictures, mirrored by chance and encoded now."""
        pixels = self.pixels[[item % len(self.pixels) for item in items]]
        flips = torch.randint(2, (len(items), 1, 1, 1), generator=generator).bool().to(pixels.device)
        mean, std = self.backbone.encode_pictures(torch.where(flips, pixels.flip(-1), pixels))
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)

    def loss(
        self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, captions: Sequence[str]
    ) -> torch.Tensor:
        """Return the mean squared error."""
        noisy, target = self.backbone.noise.mix(clean, noise, times)
        # on a CPU the text encoder stays in float32, as in ours
        with nullcontext() if self.backbone.device.type == "cpu" else self.backbone.context():
            conditioning = self.backbone.encode(captions)
        with self.backbone.context():
            made = self.backbone.predict(noisy, times, conditioning)
        return (made.float() - target.float()).square().mean()

    def step(self) -> bool:
        """Train for a step. Returns whether it was the last."""
        generator = make_generator(self.seed, self.concept.token, self.done)
        items = self.choose()
        clean = self.encode_pictures(items, generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        times = torch.randint(len(self.backbone.noise.alphas), (len(clean),), generator=generator)
        captions = [self.caption(item) for item in items]
        self.loss(clean, noise, times.to(clean.device), captions).backward()
        self.watch()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.restore_others()
        self.done += 1
        if self.done >= self.most:
            self.reason = self.reason or f"all {self.most} steps were made"
        return bool(self.reason)

    def state(self) -> dict[str, Any]:
        """Return what a continued training needs."""
        return {
            "done": self.done,
            "parameter": self.parameter.detach(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.done = state["done"]
        with torch.no_grad():
            self.parameter.copy_(state["parameter"])
        self.optimizer.load_state_dict(state["optimizer"])


class Stock(Reference):
    """The diffusers example with its defaults; its rate is constant and not multiplied by the batch."""

    batch, most, rate = 16, 5000, 1e-4

    def place(self, word: str) -> torch.nn.Parameter:
        """Add a row to the vocabulary; the whole matrix trains."""
        self.first = len(self.tokenizer)
        self.tokenizer.add_tokens([self.concept.token])
        if self.first >= self.encoder.get_input_embeddings().num_embeddings:
            self.encoder.resize_token_embeddings(self.first + 1, mean_resizing=False)
        weight = self.encoder.get_input_embeddings().weight.requires_grad_(True)
        with torch.no_grad():
            weight[self.first] = weight[self.tokenizer(word, add_special_tokens=False).input_ids].mean(0)
        self.original = weight.detach().clone()
        self.others = torch.arange(len(weight), device=weight.device) != self.first
        return weight

    def row(self) -> torch.Tensor:
        """Return the token's row [1, d]."""
        return self.parameter.detach()[self.first : self.first + 1].cpu().clone()

    def caption(self, item: int) -> str:
        """Return a caption by chance."""
        rng = random.Random(f"{self.seed}/{self.concept.token}/{self.done}/{item}")
        return self.concept.caption(item % len(self.pixels), rng)

    @torch.no_grad()
    def restore_others(self) -> None:
        """Put all other rows back."""
        self.parameter[self.others] = self.original[self.others]


class PublishedDVAR(Reference):
    """DVAR as published, its settings for textual inversion (rate 5e-3 × batch)."""

    batch, most, rate = 2, 6100, 1e-2
    watched = 4
    options: ClassVar[dict[str, Any]] = {}

    def place(self, word: str) -> torch.nn.Parameter:
        """Add a row beside the vocabulary, and draw the items that stay fixed."""
        token = self.concept.token
        rows = Rows(self.backbone.encoders, {token: 1})
        rows.set(token, rows.from_words(token, [word]))
        self.stopper = make_stopper("dvar", METHOD, self.most, **self.options)
        self.curve: list[float] = []
        generator = make_generator(self.seed, token, "fixed")
        clean = self.encode_pictures(range(self.watched), generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        times = torch.randperm(len(self.backbone.noise.alphas), generator=generator)[: self.watched]
        captions = [self.caption(item) for item in range(self.watched)]
        self.fixed = (clean, noise, times.to(clean.device), captions)
        (parameter,) = rows.parameters(token).values()
        return parameter

    def row(self) -> torch.Tensor:
        """Return the token's row [1, d]."""
        return self.parameter.detach().cpu().clone()

    def caption(self, item: int) -> str:
        """Return the caption with the item's number: as published, one index chooses picture and caption."""
        templates = self.concept.templates
        return templates[item % len(templates)].replace("{}", self.concept.token)

    @torch.no_grad()
    def watch(self) -> None:
        """Look at the fixed items."""
        self.curve.append(float(self.loss(*self.fixed)))
        if self.stopper.update(self.curve[-1]):
            self.reason = self.stopper.reason

    def state(self) -> dict[str, Any]:
        """Return what a continued training needs."""
        return super().state() | {"curve": self.curve}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        super().restore(state)
        self.curve = state["curve"]
        for value in self.curve:
            self.stopper.update(value)


class GentleDVAR(PublishedDVAR):
    """The same with our default rate: what of a comparison is the rate's doing."""

    rate = TextualInversion.row_rate * SD_RMS

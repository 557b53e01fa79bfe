"""What training needs of a pipeline, by family: its text encoders, latents, denoiser and noise."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from t2iprobe.attention import attend_plainly
from t2iprobe.devices import keep_freed_memory
from t2iprobe.errors import UserError
from t2iprobe.inversion.embeddings import spell_tokens
from t2iprobe.pipelines import Pipeline

Conditioning = dict[str, torch.Tensor]  # each [batch, …]


class Backbone:
    """A pipeline placed by `place_pipeline`, as a denoiser that is trained; subclasses are families.

    `size` is the pictures' side in pixels; `encoders` are those that take rows: name → (tokenizer, encoder).
    """

    denoiser_name = "unet"
    autoencoder_name = "vae"
    multiple = 8  # of a picture's side

    def __init__(self, pipeline: Pipeline, *, dtype: str = "float32", size: int | None = None) -> None:
        self.pipeline = pipeline
        self.dtype = dtype
        self.denoiser = getattr(pipeline, self.denoiser_name)
        self.autoencoder = getattr(pipeline, self.autoencoder_name)
        self.device = next(self.denoiser.parameters()).device
        self.encoders = self._find_encoders()
        self.size = size or self._default_size()
        if self.size % self.multiple:
            raise UserError(
                f"pictures have a multiple of {self.multiple} pixels a side, not {self.size}: change --size"
            )
        for module in (self.denoiser, self.autoencoder, *(encoder for _, encoder in self.encoders.values())):
            module.requires_grad_(False).eval()  # LDM's encoder has dropout, which would make the loss random
        configuration = self.autoencoder.config
        self.scale = configuration.scaling_factor
        self.shift = getattr(configuration, "shift_factor", None) or 0.0
        self.noise = self._make_noise()
        self._captions: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._added: dict[str, int] = {}  # tokens that the captions were read with
        if self.device.type == "cpu":
            keep_freed_memory()
            attend_plainly(self.denoiser)  # its backward is several times faster there, in any dtype

    def _find_encoders(self) -> dict[str, tuple[Any, Any]]:
        return {"clip_l": (self.pipeline.tokenizer, self.pipeline.text_encoder)}

    def _default_size(self) -> int:
        return int(self.denoiser.config.sample_size) * self.factor

    def _make_noise(self) -> "Diffusion | Flow":
        return Diffusion(self.pipeline.scheduler)

    @property
    def factor(self) -> int:
        """Pixels a latent."""
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward pass: autocast where the networks are not float32."""
        if self.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.dtype))

    def encode_pictures(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation float32 [b, c, h, w] of the latents of `pixels` [b, 3, S, S]."""
        weight = next(self.autoencoder.parameters())
        whole = weight.dtype == torch.float32  # one that overflows float16 may stay so beside the rest
        with contextlib.nullcontext() if whole else self.context():
            posterior = self.autoencoder.encode(pixels.to(weight.device, weight.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        return (mean - self.shift) * self.scale, std * self.scale

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of `prompts`, with gradients to the encoders' rows.

        What the pipeline's `encode_prompt` gives, but each caption is cut into tokens once.
        """
        if (added := self.pipeline.tokenizer.get_added_vocab()) != self._added:
            self._captions, self._added = {}, added
        encoder = self.pipeline.text_encoder
        ids, mask = (
            torch.stack(part).to(self.device)
            for part in zip(*[self._read_caption(prompt) for prompt in prompts], strict=True)
        )
        attended = mask if getattr(encoder.config, "use_attention_mask", False) else None
        return {"encoder_hidden_states": encoder(ids, attention_mask=attended)[0]}

    def _read_caption(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a caption's token ids and mask [length], padded and truncated as `encode_prompt` does it."""
        if prompt not in self._captions:
            tokenizer = self.pipeline.tokenizer
            found = tokenizer(
                [self.pipeline.maybe_convert_prompt(prompt, tokenizer)], padding="max_length",
                max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt",
            )  # fmt: skip
            self._captions[prompt] = found.input_ids[0], found.attention_mask[0]
        return self._captions[prompt]

    def predict(self, noisy: torch.Tensor, times: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the denoiser's output float32 [b, c, h, w] for `noisy` [b, c, h, w] at `times` [b]."""
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids") if name in conditioning}
        made = self.denoiser(
            noisy.to(self._denoiser_dtype()),
            times,
            conditioning["encoder_hidden_states"],
            added_cond_kwargs=added or None,
        ).sample
        return made.float()

    def _denoiser_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else self.denoiser.dtype


class StableDiffusion(Backbone):
    """SD 1 and 2."""


class StableDiffusionXL(Backbone):
    """SDXL: two text encoders, the second also pooled, and the picture's size and crop."""

    def _find_encoders(self) -> dict[str, tuple[Any, Any]]:
        pairs = {
            "clip_l": (self.pipeline.tokenizer, self.pipeline.text_encoder),
            "clip_g": (self.pipeline.tokenizer_2, self.pipeline.text_encoder_2),
        }
        return {name: pair for name, pair in pairs.items() if pair[1] is not None}  # the refiner has one

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of `prompts`, with gradients to the encoders' rows."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        times = torch.tensor([[self.size, self.size, 0, 0, self.size, self.size]], device=self.device)
        return {
            "encoder_hidden_states": embeds,
            "text_embeds": pooled,
            "time_ids": times.to(embeds.dtype).expand(len(embeds), -1),
        }


class LatentDiffusion(Backbone):
    """LDM text-to-image: a BERT that is trained with the denoiser."""

    autoencoder_name = "vqvae"

    def _find_encoders(self) -> dict[str, tuple[Any, Any]]:
        return {"bert": (self.pipeline.tokenizer, self.pipeline.bert)}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of `prompts`, with gradients to the encoder's rows."""
        tokens = self.pipeline.tokenizer(
            list(prompts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        return {"encoder_hidden_states": self.pipeline.bert(tokens.input_ids.to(self.device))[0]}


class Flux(Backbone):
    """Flux: rows in its CLIP alone, whose pooled output steers every block; T5 reads plain words."""

    denoiser_name = "transformer"
    multiple = 16  # latents are packed by twos

    def __init__(self, pipeline: Pipeline, *, dtype: str = "float32", size: int | None = None) -> None:
        super().__init__(pipeline, dtype=dtype, size=size)
        self._t5: dict[str, torch.Tensor] = {}
        read = pipeline._get_t5_prompt_embeds
        # Whoever draws with this pipeline gives T5 the words that it reads in training.
        pipeline._get_t5_prompt_embeds = lambda prompt, **more: read(
            [spell_tokens(p) for p in prompt], **more
        )

    def _default_size(self) -> int:
        return int(self.pipeline.default_sample_size) * self.factor

    def _make_noise(self) -> "Flow":
        return Flow()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of `prompts`, with gradients to CLIP's rows; T5's part is kept."""
        for prompt in prompts:
            if prompt not in self._t5:
                with torch.no_grad():
                    self._t5[prompt] = self.pipeline._get_t5_prompt_embeds(
                        prompt=[prompt], max_sequence_length=77, device=self.device
                    )
        pooled = self.pipeline._get_clip_prompt_embeds(prompt=list(prompts), device=self.device)
        return {"text": torch.cat([self._t5[prompt] for prompt in prompts]), "pooled": pooled}

    def predict(self, noisy: torch.Tensor, times: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the velocity float32 [b, c, h, w] for `noisy` [b, c, h, w] at `times` [b]."""
        batch, channels, height, width = noisy.shape
        packed = self.pipeline._pack_latents(noisy, batch, channels, height, width)
        dtype = self._denoiser_dtype()
        where = self.pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, self.device, dtype)
        text = conditioning["text"]
        guided = self.denoiser.config.guidance_embeds
        made = self.denoiser(
            hidden_states=packed.to(dtype),
            timestep=times / 1000,
            guidance=torch.full((batch,), 1.0, device=self.device) if guided else None,
            pooled_projections=conditioning["pooled"].to(dtype),
            encoder_hidden_states=text.to(dtype),
            txt_ids=torch.zeros(text.shape[1], 3, device=self.device, dtype=dtype),
            img_ids=where,
            return_dict=False,
        )[0]
        unpacked = self.pipeline._unpack_latents(made, height * self.factor, width * self.factor, self.factor)
        return unpacked.float()


class Diffusion:
    """The variance-preserving process of DDPM, with the scheduler's betas and prediction.

    Raises UserError for a scheduler of another process.
    """

    def __init__(self, scheduler: Any) -> None:
        from diffusers import DDPMScheduler

        if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
            raise UserError(
                "training knows no scheduler without betas, as EDM and flows have: take another model"
            )
        scheduler = DDPMScheduler.from_config(scheduler.config)
        self.alphas = scheduler.alphas_cumprod.float()
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise UserError(f"training knows no denoiser that predicts {self.prediction!r}")

    def times(self, quantiles: torch.Tensor) -> torch.Tensor:
        """Return timesteps [b] at `quantiles` [b] in [0, 1) of the uniform distribution."""
        return (quantiles * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)

    def mix(
        self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return noisy latents and what the denoiser should make of them, both [b, c, h, w]."""
        alphas = self.alphas.to(clean.device)[times][:, None, None, None]
        signal, rest = alphas.sqrt(), (1 - alphas).sqrt()
        target = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: signal * noise - rest * clean,
            "sample": lambda: clean,
        }[self.prediction]()
        return signal * clean + rest * noise, target


class Flow:
    """Rectified flow: straight lines from latents to noise, logit-normal in time (SD3, §3.1)."""

    def times(self, quantiles: torch.Tensor) -> torch.Tensor:
        """Return times [b] in (0, 1000) at `quantiles` [b] of the logit-normal distribution."""
        normal = torch.special.ndtri(quantiles.double().clamp(1e-4, 1 - 1e-4))
        return (1000 * torch.sigmoid(normal)).float()

    def mix(
        self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return noisy latents and the velocity from them, both [b, c, h, w]."""
        share = (times / 1000)[:, None, None, None].to(clean)
        return (1 - share) * clean + share * noise, noise - clean


FAMILIES: dict[str, type[Backbone]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "LDMTextToImagePipeline": LatentDiffusion,
    "FluxPipeline": Flux,
}


def make_backbone(pipeline: Pipeline, *, dtype: str = "float32", size: int | None = None) -> Backbone:
    """Return the backbone of a pipeline. Raises UserError for a family that cannot be trained."""
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise UserError(f"{name} cannot be taught a word here: {', '.join(FAMILIES)} can")
    return FAMILIES[name](pipeline, dtype=dtype, size=size)

"""Custom Diffusion (arXiv 2212.04488): keys and values of the cross-attention, and the token's rows."""

from collections.abc import Mapping
from pathlib import Path

import torch

from t2iprobe.inversion.backbones import Backbone
from t2iprobe.inversion.formats import load_custom_diffusion, read_custom_diffusion, write_custom_diffusion
from t2iprobe.inversion.methods.base import Method


class _Trained(torch.nn.Module):
    """A linear layer with a float32 weight of its own, used in whatever dtype its input has."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(layer.weight.detach().float().clone())
        self.bias = layer.bias

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        # Pictures are drawn without autocast.
        return torch.nn.functional.linear(tensor, self.weight.to(tensor.dtype), self.bias)


class CustomDiffusion(Method):
    """Train to_k and to_v of every cross-attention with the rows; prior pictures hold the rest."""

    name = "custom-diffusion"
    families = ("StableDiffusionPipeline",)
    uses_prior = True
    max_steps = 500
    rate = 1e-4
    row_rate = 0.02

    def __init__(self, backbone: Backbone, tokens: Mapping[str, int], rank: int = 4, seed: int = 0) -> None:
        super().__init__(backbone, tokens, rank, seed)
        named = backbone.denoiser.named_modules()
        self._attentions = {name: module for name, module in named if name.endswith(".attn2")}
        self._originals = {}
        for name, attention in self._attentions.items():
            for part in ("to_k", "to_v"):
                layer = getattr(attention, part)
                self._originals[name, part] = layer
                setattr(attention, part, _Trained(layer))

    def weights(self) -> list[torch.nn.Parameter]:
        """Return the matrices of keys and values."""
        return [
            getattr(attention, part).weight
            for attention in self._attentions.values()
            for part in ("to_k", "to_v")
        ]

    def save(self, token: str, folder: Path, metadata: Mapping[str, str]) -> list[str]:
        """Write keys and values for the denoiser's own ``load_attn_procs``, and the rows beside them."""
        pairs = {
            name: (attention.to_k.weight.detach().cpu(), attention.to_v.weight.detach().cpu())
            for name, attention in self._attentions.items()
        }
        processors = self.backbone.denoiser.attn_processors
        written = write_custom_diffusion(folder, pairs, processors, metadata)
        return [written.name, *super().save(token, folder, metadata)]

    def load(self, token: str, folder: Path) -> None:
        """Put what `save` wrote back into the backbone."""
        load_custom_diffusion(self.backbone.denoiser, read_custom_diffusion(folder))
        super().load(token, folder)

    def remove(self) -> None:
        """Give the denoiser its own keys and values back, and take the rows out."""
        for (name, part), layer in self._originals.items():
            setattr(self._attentions[name], part, layer)
        super().remove()

"""DreamBooth (arXiv 2208.12242) with low-rank adapters (arXiv 2106.09685) in the denoiser's attention."""

from collections.abc import Mapping
from pathlib import Path

import torch

from t2iprobe.inversion.backbones import Backbone
from t2iprobe.inversion.methods.base import Method
from t2iprobe.inversion.weight_files import write_safetensors

_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class DreamBoothLora(Method):
    """Train PEFT adapters of the attention with the rows: a row left at a word would teach that word."""

    name = "dreambooth-lora"
    families = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline")
    uses_prior = True
    max_steps = 1000
    rate = 5e-4
    row_rate = 0.02

    def __init__(self, backbone: Backbone, tokens: Mapping[str, int], rank: int = 4, seed: int = 0) -> None:
        super().__init__(backbone, tokens, rank, seed)
        from peft import LoraConfig

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            configuration = LoraConfig(
                r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=_TARGETS
            )
            backbone.denoiser.add_adapter(configuration, adapter_name="default")
        for parameter in self.weights():
            parameter.data = parameter.data.float()

    def weights(self) -> list[torch.nn.Parameter]:
        """Return the adapters' matrices."""
        named = self.backbone.denoiser.named_parameters()
        return [parameter for name, parameter in named if ".lora_" in name]

    def save(self, token: str, folder: Path, metadata: Mapping[str, str]) -> list[str]:
        """Write the adapters by the pipeline's own ``save_lora_weights``, and the rows beside them."""

        def write(weights: dict[str, torch.Tensor], path: str) -> None:
            write_safetensors(Path(path), weights, metadata)  # whole or not at all

        from peft.utils import get_peft_model_state_dict

        layers = get_peft_model_state_dict(self.backbone.denoiser, adapter_name="default")
        layers = {name: value.detach().float().cpu().contiguous() for name, value in layers.items()}
        self.backbone.pipeline.save_lora_weights(
            str(folder), **{f"{self.backbone.denoiser_name}_lora_layers": layers}, save_function=write
        )
        return ["pytorch_lora_weights.safetensors", *super().save(token, folder, metadata)]

    def load(self, token: str, folder: Path) -> None:
        """Put what `save` wrote back into the backbone."""
        from peft.utils import set_peft_model_state_dict
        from safetensors.torch import load_file

        stored = load_file(folder / "pytorch_lora_weights.safetensors")
        prefix = f"{self.backbone.denoiser_name}."
        layers = {name.removeprefix(prefix): value for name, value in stored.items()}
        set_peft_model_state_dict(self.backbone.denoiser, layers, adapter_name="default")
        super().load(token, folder)

    def remove(self) -> None:
        """Take the adapters and the rows out of the backbone."""
        self.backbone.denoiser.unload_lora()
        super().remove()

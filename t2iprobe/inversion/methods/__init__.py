"""What trains and what is saved: textual inversion, DreamBooth-LoRA, Custom Diffusion."""

from t2iprobe.errors import UserError, suggest
from t2iprobe.inversion.methods.base import Method
from t2iprobe.inversion.methods.custom_diffusion import CustomDiffusion
from t2iprobe.inversion.methods.dreambooth_lora import DreamBoothLora
from t2iprobe.inversion.methods.textual_inversion import TextualInversion

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (TextualInversion, DreamBoothLora, CustomDiffusion)
}

__all__ = ["METHODS", "CustomDiffusion", "DreamBoothLora", "Method", "TextualInversion", "find_method"]


def find_method(name: str) -> type[Method]:
    """Return the method of that name. Raises UserError, with near names."""
    if name not in METHODS:
        raise UserError(
            f"there is no method {name!r}{suggest(name, METHODS) or ': use ' + ', '.join(METHODS)}"
        )
    return METHODS[name]

"""How denoisers attend: by a back end that was chosen, or all scores at once where sequences are short."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from t2iprobe.errors import UserError, suggest

if TYPE_CHECKING:
    import torch

    from t2iprobe.pipelines import Pipeline

DENOISERS = ("unet", "transformer", "prior", "decoder")
SHORT = 256  # places of a map up to which all scores of its attention are computed at once


def find_denoisers(pipeline: "Pipeline") -> "Iterator[tuple[str, torch.nn.Module]]":
    """Yield name and network of what a pipeline runs at each step."""
    import torch

    for name in DENOISERS:
        if isinstance(network := getattr(pipeline, name, None), torch.nn.Module):
            yield name, network


def choose_attention(pipeline: "Pipeline", backend: str) -> None:
    """Let a pipeline's denoisers attend by a back end of diffusers, such as ``_native_cudnn`` or ``sage``.

    Raises UserError for a back end that is not there, or not for this family. UNets know ``native``,
    ``_native_math`` and ``xformers`` only: diffusers asks no other from them.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    known = [each.value for each in AttentionBackendName]
    if backend not in known:
        near = suggest(backend, known) or f": it has {', '.join(known)}"
        raise UserError(f"diffusers has no attention {backend!r}{near}")
    processors = {"native": AttnProcessor2_0, "_native_math": AttnProcessor}
    for name, network in find_denoisers(pipeline):
        found: Any = network
        try:
            if any(hasattr(each, "_attention_backend") for each in found.attn_processors.values()):
                found.set_attention_backend(backend)
            elif backend in processors:
                found.set_attn_processor(processors[backend]())
            elif backend == "xformers":
                found.enable_xformers_memory_efficient_attention()
            else:
                raise UserError(
                    f"the {name} of a {type(pipeline).__name__} attends by native, _native_math or xformers, "
                    f"not by {backend!r}"
                )
        except (RuntimeError, ValueError, ImportError, AttributeError) as error:
            text = str(error).strip().splitlines()[0][:200]
            raise UserError(f"the attention {backend!r} cannot be used here: {text}") from None


def attend_plainly(network: "torch.nn.Module") -> None:
    """Let diffusers' attention over short sequences compute all scores at once, in place.

    On a CPU that is two to three times faster than the fused kernel, and its backward more. The softmax is
    taken in float32: in bfloat16 it is slow for lengths such as a prompt's 77.
    """
    import torch
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    class ShortAttention(AttnProcessor2_0):
        plain = AttnProcessor()

        def __call__(
            self,
            attn: Any,
            hidden_states: torch.Tensor,
            encoder_hidden_states: torch.Tensor | None = None,
            attention_mask: torch.Tensor | None = None,
            temb: torch.Tensor | None = None,
        ) -> torch.Tensor:
            places = hidden_states.shape[2:].numel() if hidden_states.ndim == 4 else hidden_states.shape[1]
            attend = self.plain if places <= SHORT else super().__call__
            return attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    for layer in network.modules():
        if isinstance(layer, Attention) and type(layer.processor) is AttnProcessor2_0:
            layer.processor = ShortAttention()
            layer.upcast_softmax = True

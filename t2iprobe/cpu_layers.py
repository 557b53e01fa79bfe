"""Layers that do in bfloat16 on a CPU what diffusers' own do, to rounding, in less time."""

import threading
from typing import TYPE_CHECKING, Any

from t2iprobe.attention import attend_plainly

if TYPE_CHECKING:
    import torch

LARGE = 256  # places of a map from which on copying it costs more than the norm gains


def suit_cpu(network: "torch.nn.Module") -> None:
    """Let a network of a pipeline compute in bfloat16 on a CPU as that does it fastest, in place.

    Beside `attend_plainly`: group norms of small maps work on contiguous copies, since the kernel for
    channels last is several times slower where a group has few channels; large maps are normed one by one,
    since that kernel splits a whole batch among threads, and a picture's sums would depend on how many
    others there are. Gates are copied together before their GELU; tokens become maps without a copy. What
    cross-attention reads of a prompt is computed once for all steps, and what guidance's two halves have in
    common, once for both.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.activations import GEGLU
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from torch.nn import functional

    class LoneGroupNorm(torch.nn.GroupNorm):
        def forward(self, maps: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_compiling():  # its kernels are its own
                return super().forward(maps)
            if maps.ndim == 4 and maps.shape[2:].numel() >= LARGE:
                return torch.cat([super(LoneGroupNorm, self).forward(one) for one in maps.split(1)])
            normed = super().forward(maps.contiguous())
            return normed.contiguous(memory_format=torch.channels_last) if maps.ndim == 4 else normed

    class ContiguousGEGLU(GEGLU):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            values, gate = self.proj(tokens).chunk(2, dim=-1)
            return values * functional.gelu(gate.contiguous())

    class UncopiedTransformer(Transformer2DModel):
        def _get_output_for_continuous_inputs(
            self,
            hidden_states: torch.Tensor,
            residual: torch.Tensor,
            batch_size: int,
            height: int,
            width: int,
            inner_dim: int,
        ) -> torch.Tensor:
            tokens = self.proj_out(hidden_states) if self.use_linear_projection else hidden_states
            maps = tokens.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
            return (maps if self.use_linear_projection else self.proj_out(maps)) + residual

    attend_plainly(network)
    for layer in network.modules():
        if type(layer) is torch.nn.GroupNorm:
            layer.__class__ = LoneGroupNorm
        elif type(layer) is Transformer2DModel:
            layer.__class__ = UncopiedTransformer
        elif type(layer) is GEGLU:
            layer.__class__ = ContiguousGEGLU
    if isinstance(network, UNet2DConditionModel):
        _share_guidance(network)
        _keep_projections(network)


class Lane(threading.local):
    """What this thread's UNet has computed beforehand. Compiled code reads it, too, under guards."""

    halves_agree = False  # whether the batch's halves differ in their prompts alone
    projections: "list[torch.Tensor] | None" = None  # of the prompts, by place


lane = Lane()


def _share_guidance(unet: Any) -> None:
    """Compute once what both halves of a guided batch have in common: all before the first cross-attention.

    The halves are the same latents at the same time, and differ in their prompts alone.
    """
    config, first = unet.config, unet.down_blocks[0]
    if config.addition_embed_type or config.class_embed_type or not getattr(first, "attentions", None):
        return
    transformer = first.attentions[0]
    block = transformer.transformer_blocks[0]
    unet.register_forward_pre_hook(_compare_halves, with_kwargs=True)
    common = [unet.conv_in, first.resnets[0], transformer.norm, transformer.proj_in]
    if block.norm_type == "layer_norm" and not block.only_cross_attention:
        common += [block.norm1, block.attn1]
    for layer in common:
        layer.__class__ = _share_halves(type(layer))


def _name_arguments(given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(("sample", "timestep", "encoder_hidden_states"), given, strict=False)) | named


def _compare_halves(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    import torch

    called = _name_arguments(given, named)
    latents, time = called["sample"], called["timestep"]
    half = len(latents) // 2
    lane.halves_agree = (
        torch.is_inference_mode_enabled()
        and torch.as_tensor(time).numel() == 1
        and len(latents) == 2 * half
        and torch.equal(latents[:half], latents[half:])
    )


def _share_halves(kind: Any) -> Any:
    """Return a layer's class that computes the first half of a batch for both where they agree."""
    import torch

    class Shared(kind):
        def forward(self, tensor: torch.Tensor, *others: torch.Tensor, **named: Any) -> torch.Tensor:
            if not lane.halves_agree:
                return super().forward(tensor, *others, **named)
            half = len(tensor) // 2
            made = super().forward(tensor[:half], *(other[:half] for other in others), **named)
            return torch.cat([made, made])

    return Shared


def _keep_projections(unet: Any) -> None:
    """Project a prompt once for all steps: what cross-attention reads of it is kept with its embeddings."""
    import torch
    from diffusers.models.attention import BasicTransformerBlock

    class PromptProjection(torch.nn.Linear):
        place: int

        def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
            kept = lane.projections
            return super().forward(embeddings) if kept is None else kept[self.place]

    layers: list[Any] = []
    for block in unet.modules():
        attention = block.attn2 if isinstance(block, BasicTransformerBlock) else None
        if attention is not None and attention.is_cross_attention and not attention.norm_cross:
            layers += [layer for layer in (attention.to_k, attention.to_v) if type(layer) is torch.nn.Linear]
    if unet.config.dual_cross_attention or not layers:
        return  # its blocks read parts of the embeddings
    for place, layer in enumerate(layers):
        layer.__class__, layer.place = PromptProjection, place
    unet.prompt_layers = layers  # an attribute: a copy of the network has its own
    unet.register_forward_pre_hook(_project, with_kwargs=True)
    unet.register_forward_hook(_forget_projections, always_call=True)


def _project(unet: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    import torch

    embeddings, layers = _name_arguments(given, named).get("encoder_hidden_states"), unet.prompt_layers
    apart = unet.encoder_hid_proj is not None or any(layer.weight.is_inference() for layer in layers)
    if embeddings is None or apart or not torch.is_inference_mode_enabled():
        return
    kept = embeddings.__dict__.setdefault("projections", {})
    # Trained or loaded anew, layers make something else.
    key = unet, *(layer.weight._version for layer in layers)
    if key not in kept:
        kept[key] = [layer(embeddings) for layer in layers]
    lane.projections = kept[key]


def _forget_projections(*_: Any) -> None:
    lane.projections = None

"""What makes loaded networks faster and leaves their pictures and logits what they were, to rounding."""

import copy
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from t2iprobe.errors import UserError, suggest

if TYPE_CHECKING:
    import torch

Pipeline = Any
DENOISERS = ("unet", "transformer", "prior", "decoder")


def fold_norms(network: "torch.nn.Module", inputs: "torch.Tensor") -> "torch.nn.Module":
    """Return a copy of a network in which convolutions do the work of the batch norms right behind them.

    Which follows which is seen by running the network on `inputs` [n, 3, H, W]. What a norm does beyond its
    scaling (timm's activate, too) stays. Where the copy says something else, the network itself is returned.
    """
    import torch

    if not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules()):
        return network
    folded = copy.deepcopy(network)
    with torch.no_grad():  # not in inference mode: its tensors could not be weights elsewhere
        before = folded(inputs)
        parents = {child: parent for parent in folded.modules() for child in parent.children()}
        for convolution, norm, _ in _find_pairs(folded, inputs, torch.nn.BatchNorm2d):
            _fold(convolution, norm)
            _replace(parents[norm], norm, _activation(norm))
        after = folded(inputs)
    same = torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.std()))
    return folded if same else network


def _find_pairs(
    network: "torch.nn.Module", inputs: "torch.Tensor", kind: type
) -> "list[tuple[Any, Any, torch.Size]]":
    """Return convolutions, the module of `kind` right behind each, and the size of the maps that it reads."""
    import torch

    convolutions: dict[int, tuple[Any, torch.Size]] = {}  # by what they made
    pairs: list[tuple[Any, Any, torch.Size]] = []
    kept: list[torch.Tensor] = []  # so that no address is used twice

    def note(module: torch.nn.Module, given: tuple[Any, ...], made: Any) -> None:
        if isinstance(module, torch.nn.Conv2d):
            convolutions[id(made)] = module, given[0].shape[2:]
            kept.append(made)
        elif id(given[0]) in convolutions:
            convolution, size = convolutions[id(given[0])]
            pairs.append((convolution, module, size))

    kinds = (torch.nn.Conv2d, kind)
    hooks = [module.register_forward_hook(note) for module in network.modules() if isinstance(module, kinds)]
    network(inputs)
    for hook in hooks:
        hook.remove()
    return pairs


def fuse_clamps(network: "torch.nn.Module", inputs: "torch.Tensor") -> "torch.nn.Module":
    """Return a copy of a network in which convolutions clamp what they make where a ReLU6 stands behind them.

    For CPUs: oneDNN does it while it writes the maps; on its own a clamp in bfloat16 takes as long as a
    convolution. Padding on one side, as TensorFlow's, is a row and a column of zeros in the kernel, not a
    copy of the maps. For maps of other sizes than those from `inputs` [n, 3, H, W] the layers do what they
    did. The weights must not change any more. Where the copy says something else, or torch has no oneDNN,
    the network itself is returned.
    """
    import torch

    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return network
    fused = copy.deepcopy(network)
    parents = {child: parent for parent in fused.modules() for child in parent.children()}
    with torch.no_grad():
        before = fused(inputs).float()
        pairs = _find_pairs(fused, inputs, torch.nn.ReLU6)
        uses = Counter(id(module) for pair in pairs for module in pair[:2])
        for convolution, clamp, size in pairs:
            if uses[id(convolution)] == uses[id(clamp)] == 1 and _is_plain(convolution):
                _replace(parents[convolution], convolution, _clamping(convolution, clamp, size))
                _replace(parents[clamp], clamp, torch.nn.Identity())
        try:
            after = fused(inputs).float()
        except RuntimeError:  # oneDNN computes this dtype on newer processors only
            return network
    return fused if (after - before).abs().mean() <= 0.05 * before.std() else network


def _is_plain(convolution: Any) -> bool:
    kind = type(convolution).__name__
    if kind not in ("Conv2d", "Conv2dSame") or convolution.padding_mode != "zeros":
        return False
    return not isinstance(convolution.padding, str) and set(convolution.dilation) == {1}


def _clamping(convolution: Any, clamp: "torch.nn.Module", size: "torch.Size") -> "torch.nn.Module":
    """Return a layer that does what a convolution and the ReLU6 behind it do to maps of `size`."""
    import torch
    from torch.nn import functional

    weight, stride, padding = convolution.weight, convolution.stride, convolution.padding
    if type(convolution).__name__ == "Conv2dSame":  # timm's: what the size asks for, the odd one behind
        totals = [
            max((-(-side // step) - 1) * step + span - side, 0)
            for side, step, span in zip(size, stride, weight.shape[2:], strict=True)
        ]
        extra = [total % 2 for total in totals]
        weight = functional.pad(weight, (extra[1], 0, extra[0], 0))
        padding = tuple(-(-total // 2) for total in totals)

    class Clamping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = torch.nn.Sequential(convolution, clamp)

        def forward(self, maps: torch.Tensor) -> torch.Tensor:
            if maps.shape[2:] != size or maps.dtype != weight.dtype:
                return self.plain(maps)
            return torch.ops.mkldnn._convolution_pointwise(
                maps, weight, convolution.bias, padding, stride, convolution.dilation, convolution.groups,
                "hardtanh", [0.0, 6.0], "",
            )  # fmt: skip

    return Clamping()


def _fold(convolution: "torch.nn.Conv2d", norm: "torch.nn.BatchNorm2d") -> None:
    import torch
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    assert norm.running_mean is not None
    assert norm.running_var is not None
    convolution.weight, bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    convolution.bias = torch.nn.Parameter(bias, requires_grad=False)


def _activation(norm: "torch.nn.Module") -> "torch.nn.Module":
    import torch

    if type(norm) is torch.nn.BatchNorm2d:
        return torch.nn.Identity()
    parts = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
    return parts[0] if len(parts) == 1 else torch.nn.Sequential(*parts)


def _replace(parent: "torch.nn.Module", old: "torch.nn.Module", new: "torch.nn.Module") -> None:
    name = next(name for name, child in parent.named_children() if child is old)
    setattr(parent, name, new)


def find_denoisers(pipeline: Pipeline) -> "Iterator[tuple[str, torch.nn.Module]]":
    """Yield name and network of what a pipeline runs at each step."""
    import torch

    for name in DENOISERS:
        if isinstance(network := getattr(pipeline, name, None), torch.nn.Module):
            yield name, network


def choose_attention(pipeline: Pipeline, backend: str) -> None:
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


LARGE = 256  # places of a map from which on copying it costs more than the norm gains
SHORT = 256  # places of a map up to which all scores of its attention are computed at once


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


class _Lane(threading.local):
    """What this thread's UNet has computed beforehand. Compiled code reads it, too, under guards."""

    halves_agree = False  # whether the batch's halves differ in their prompts alone
    projections: "list[torch.Tensor] | None" = None  # of the prompts, by place


_lane = _Lane()


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
    _lane.halves_agree = (
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
            if not _lane.halves_agree:
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
            kept = _lane.projections
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
    _lane.projections = kept[key]


def _forget_projections(*_: Any) -> None:
    _lane.projections = None


def compile_networks(pipeline: Pipeline) -> None:
    """Compile a pipeline's denoisers in place, at their first call; on a GPU its decoder, too.

    On a CPU the decoder's large maps are faster layer by layer. Batches may differ in size.
    """
    for network in _compiled_networks(pipeline):
        network.plain_forward = network.__dict__.get("forward")  # of offloaded networks
        network.forward = _compile(network)


def stop_compiling(pipeline: Pipeline, error: BaseException) -> None:
    """Let a pipeline's networks run as they were before `compile_networks`, and warn once why."""
    for network in _compiled_networks(pipeline):
        del network.forward
        if network.plain_forward is not None:
            network.forward = network.plain_forward
    lines = str(error).strip().splitlines() or [type(error).__name__]
    warnings.warn(
        f"torch.compile does not work here, drawing goes on without: {lines[0][:200]}", stacklevel=2
    )


def _compiled_networks(pipeline: Pipeline) -> "list[Any]":
    networks: list[Any] = [network for _, network in find_denoisers(pipeline)]
    decoder = getattr(getattr(pipeline, "vae", None), "decoder", None)
    if decoder is not None and not _is_on_cpu(decoder):
        networks.append(decoder)
    return networks


def _is_on_cpu(network: "torch.nn.Module") -> bool:
    return next(network.parameters()).device.type == "cpu"


def _compile(network: "torch.nn.Module") -> Any:
    """Return a network's compiled forward. What its hooks do stays outside."""
    import torch
    import torch._inductor.config

    # Of diffusers' own code, which is right without its cache.
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    compiled = torch.compile(network.forward)
    if not _is_on_cpu(network):
        return compiled

    turns = _Turns()
    known: set[Any] = set()

    def forward(*given: Any, **named: Any) -> Any:
        tensors = [value for value in (*given, *named.values()) if isinstance(value, torch.Tensor)]
        for value in (*tensors, *(_lane.projections or ())):
            if value.ndim > 1:
                torch._dynamo.maybe_mark_dynamic(value, 0)
        shapes = tuple((value.shape[1:], value.shape[:1] == (1,)) for value in tensors)
        kind = shapes, _lane.halves_agree, _lane.projections is None
        # Weights are constants there, which oneDNN may lay out as it likes. The setting holds for the thread.
        with turns.take(alone=kind not in known), torch._inductor.config.patch(freezing=True):
            made = compiled(*given, **named)
        known.add(kind)
        return made

    return forward


class _Turns:
    """Let threads run what is compiled at the same time, but whoever compiles alone.

    Else torch does not know again, in one thread, what it compiles in another, and compiles it once more.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0  # -1: one, alone
        self._asking = 0  # to be alone

    @contextmanager
    def take(self, *, alone: bool) -> "Iterator[None]":
        with self._changed:
            self._asking += alone
            self._changed.wait_for(
                lambda: self._running == 0 if alone else self._running >= 0 and not self._asking
            )
            self._asking -= alone
            self._running += -1 if alone else 1
        try:
            yield
        finally:
            with self._changed:
                self._running += 1 if alone else -1
                self._changed.notify_all()

"""What makes loaded networks faster and leaves their pictures and logits what they were, to rounding."""

import copy
import warnings
from collections.abc import Iterator
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
    convolutions: dict[int, Any] = {}  # by what they made
    norms: list[tuple[Any, Any]] = []
    kept: list[torch.Tensor] = []  # so that no address is used twice

    def note(module: torch.nn.Module, given: tuple[Any, ...], made: Any) -> None:
        if isinstance(module, torch.nn.Conv2d):
            convolutions[id(made)] = module
            kept.append(made)
        elif id(given[0]) in convolutions:
            norms.append((convolutions[id(given[0])], module))

    kinds = (torch.nn.Conv2d, torch.nn.BatchNorm2d)
    hooks = [module.register_forward_hook(note) for module in folded.modules() if isinstance(module, kinds)]
    with torch.no_grad():  # not in inference mode: its tensors could not be weights elsewhere
        before = folded(inputs)
        for hook in hooks:
            hook.remove()
        parents = {child: parent for parent in folded.modules() for child in parent.children()}
        for convolution, norm in norms:
            _fold(convolution, norm)
            _replace(parents[norm], norm, _activation(norm))
        after = folded(inputs)
    same = torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.std()))
    return folded if same else network


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


def compile_networks(pipeline: Pipeline) -> None:
    """Compile a pipeline's denoisers and its decoder, in place, at their first call."""
    for network in _compiled_networks(pipeline):
        # On a CPU weights are constants that the compiler may lay out for its kernels.
        network.compile(options={"freezing": next(network.parameters()).device.type == "cpu"})


def stop_compiling(pipeline: Pipeline, error: BaseException) -> None:
    """Let a pipeline's networks run as they were before `compile_networks`, and warn once why."""
    for network in _compiled_networks(pipeline):
        network._compiled_call_impl = None
    lines = str(error).strip().splitlines() or [type(error).__name__]
    warnings.warn(
        f"torch.compile does not work here, drawing goes on without: {lines[0][:200]}", stacklevel=2
    )


def _compiled_networks(pipeline: Pipeline) -> "list[Any]":
    networks: list[Any] = [network for _, network in find_denoisers(pipeline)]
    decoder = getattr(getattr(pipeline, "vae", None), "decoder", None)
    return [*networks, *([decoder] if decoder is not None else [])]

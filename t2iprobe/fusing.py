"""A judge's layers that are computed together: what they say stays what it was, to rounding."""

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


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

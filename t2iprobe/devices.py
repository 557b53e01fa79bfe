"""Where and in what precision a network runs, and what makes a CPU fast and its batches agree."""

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from t2iprobe.errors import UserError, suggest

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def best_device() -> str:
    """Return ``cuda``, ``mps`` or ``cpu``, the first that is there."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_device(device: str) -> str:
    """Return `device`, or the best one for ``auto``. Raises UserError for one that this machine lacks."""
    import torch

    if device == "auto":
        return best_device()
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"there is no device {device!r} here ({reason}): use auto, or what `t2iprobe info` lists"
        ) from None
    return device


def best_dtype(device: str) -> str:
    """Return the fastest dtype that `device` computes natively and that is safe for diffusion."""
    import torch

    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if device == "cpu" and _cpu_computes_bfloat16() else "float32"


def _cpu_computes_bfloat16() -> bool:
    import torch

    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if hasattr(torch.cpu, probe) and getattr(torch.cpu, probe)():
            return True
    with contextlib.suppress(OSError):
        return bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", Path("/proc/cpuinfo").read_text()))
    return False


def resolve_dtype(dtype: str, device: str) -> str:
    """Return `dtype`, or the best one of `device` for ``auto``. Raises UserError for an unknown one."""
    if dtype == "auto":
        return best_dtype(device)
    if dtype not in DTYPES:
        raise UserError(
            f"there is no dtype {dtype!r}{suggest(dtype, DTYPES) or ': use auto, ' + ', '.join(DTYPES)}"
        )
    return dtype


def lower_weights(module: "torch.nn.Module", dtype: "torch.dtype") -> None:
    """Cast the weights of all convolutions and linear layers in `module` to `dtype`, in place."""
    import torch

    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            layer.to(dtype)


def inference_context(device: str, dtype: str) -> contextlib.ExitStack:
    """Return the context in which a placed network runs: no gradients; autocast for bfloat16 on a CPU."""
    import torch

    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode())
    if device == "cpu" and dtype == "bfloat16":
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    return stack


def count_threads() -> int:
    """Return with how many threads torch computes on the CPU."""
    import torch

    return torch.get_num_threads()


def set_threads(count: int) -> None:
    """Let torch compute with so many threads whatever this thread of Python calls, and those to come."""
    import torch

    torch.set_num_threads(count)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says that memory is lacking, on whatever device."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def release_memory(device: str) -> None:
    """Give memory that is not in use back to the device."""
    import gc

    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    elif device.startswith("mps"):
        torch.mps.empty_cache()


def keep_freed_memory() -> None:
    """Let this process keep blocks of up to 32 MB that it frees, where the C library is glibc.

    Otherwise tensors of more than 128 kB are new memory of the system's, and each page is zeroed before use.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h

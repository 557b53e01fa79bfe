"""What a call of a pipeline changes, kept to one batch; pictures decoded again where float16 overflowed."""

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from t2iprobe.pipelines import Pipeline

if TYPE_CHECKING:
    import torch


def copy_for_a_batch(pipeline: Pipeline) -> Pipeline:
    """Copy what a call changes (scheduler, decoder's method, the pipeline's own notes), not the networks."""
    own = copy.copy(pipeline)
    for name in ("scheduler", "prior_scheduler", "decoder_scheduler"):
        if getattr(own, name, None) is not None:
            setattr(own, name, copy.deepcopy(getattr(own, name)))
    autoencoder = _name_autoencoder(own)
    if autoencoder is not None:
        setattr(own, autoencoder, copy.copy(getattr(own, autoencoder)))
    for name in ("prior_pipe", "decoder_pipe"):  # the stages of Kandinsky, Würstchen and Cascade
        if getattr(own, name, None) is not None:
            setattr(own, name, copy_for_a_batch(getattr(own, name)))
    return own


def _name_autoencoder(pipeline: Pipeline) -> str | None:
    names = (name for name in ("vae", "vqvae", "movq") if hasattr(getattr(pipeline, name, None), "decode"))
    return next(names, None)


class DecoderWatch:
    """Remember the latents that a batch's autoencoder was last given, to decode them again in float32.

    The autoencoders of SD 1 and SDXL overflow float16 on some latents, and the picture is NaN.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        pipeline = getattr(pipeline, "decoder_pipe", pipeline)
        name = _name_autoencoder(pipeline)
        self._latents: torch.Tensor | None = None
        if name is None:
            return
        self._autoencoder: Any = getattr(pipeline, name)
        decode = self._autoencoder.decode

        def remember(latents: "torch.Tensor", *arguments: Any, **named: Any) -> Any:
            self._latents = latents
            decoded = decode(latents, *arguments, **named)
            if isinstance(decoded, tuple):
                return (decoded[0].float(), *decoded[1:])
            decoded.sample = decoded.sample.float()  # numpy, which some families ask for, has no bfloat16
            return decoded

        self._autoencoder.decode = remember  # of this batch's own copy

    def mend(self, pictures: np.ndarray) -> np.ndarray:
        """Return the batch's pictures [n, H, W, 3] as float32, decoded again where they hold NaN.

        What still holds NaN then is broken.
        """
        import torch

        pictures = np.asarray(pictures, np.float32)
        broken = ~np.isfinite(pictures).all(axis=(1, 2, 3))
        if broken.any():
            with torch.inference_mode():
                pictures[broken] = self._decode_again(np.flatnonzero(broken))
        return pictures

    def _decode_again(self, rows: np.ndarray) -> np.ndarray | float:
        import torch

        if self._latents is None:
            return np.nan
        del self._autoencoder.decode
        autoencoder = copy.deepcopy(self._autoencoder).float()
        # A compiled decoder's forward is of the network that was copied.
        getattr(autoencoder, "decoder", autoencoder).__dict__.pop("forward", None)
        latents = self._latents[torch.from_numpy(rows).to(self._latents.device)].float()
        decoded = autoencoder.decode(latents, return_dict=False)[0]
        return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()

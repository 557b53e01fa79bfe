"""Pictures on the way are those that the model means, or none."""

from typing import Any

import numpy as np
import pytest
import torch

from t2iprobe.errors import UserError
from t2iprobe.inversion.backbones import Backbone, make_backbone
from t2iprobe.inversion.drawing import draw_pictures
from t2iprobe.pipelines import place_pipeline
from t2iprobe.testing import tiny_pipeline


def make(dtype: str, factor: float = 1) -> Backbone:
    """A backbone whose decoder's first layer is scaled: norms do not care, but float16 overflows."""
    pipeline = tiny_pipeline("sd")
    pipeline.vae.decoder.conv_in.weight.data *= factor
    pipeline.vae.decoder.conv_in.bias.data *= factor
    place_pipeline(pipeline, "cpu", dtype)
    return make_backbone(pipeline, dtype=dtype)


def test_a_picture_that_overflows_float16_is_decoded_again() -> None:
    half, exact = (
        np.stack(draw_pictures(make(dtype, 1e5), ["a cat", "a dog"], [0, 1], steps=2)).astype(int)
        for dtype in ("float16", "float32")
    )
    assert np.abs(half - exact).mean() < 3
    assert half.std() > 5


def test_a_picture_that_stays_nan_is_refused() -> None:
    backbone = make("float32")
    backbone.autoencoder.decoder.conv_out.bias.data[:] = float("nan")
    with pytest.raises(UserError, match="drawn for 'a cat' holds NaN in float32: try --dtype"):
        draw_pictures(backbone, ["a cat"], [0], steps=1)


def test_fewer_pictures_are_drawn_at_once_where_the_memory_is_too_small() -> None:
    prompts, seeds = ["a cat", "a dog", "a cow"], [0, 1, 2]
    backbone = make("float32")
    whole = draw_pictures(backbone, prompts, seeds, steps=2, guidance=2.0)

    def limit(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        if len(given[0]) > 2:  # a picture, with and without its prompt
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    backbone.denoiser.register_forward_pre_hook(limit)
    parts = draw_pictures(backbone, prompts, seeds, steps=2, guidance=2.0)
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(whole, parts, strict=True))

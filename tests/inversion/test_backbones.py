"""What training needs of a pipeline, whatever dtypes its networks have."""

import numpy as np
import torch

from t2iprobe.inversion.backbones import Backbone, make_backbone
from t2iprobe.inversion.drawing import draw_pictures
from t2iprobe.pipelines import place_pipeline
from t2iprobe.testing import tiny_pipeline


def make(dtype: str) -> Backbone:
    """SDXL with an autoencoder in float32, which the published one needs."""
    pipeline = tiny_pipeline("sdxl")
    place_pipeline(pipeline, "cpu", dtype)
    pipeline.vae.half().float()
    return make_backbone(pipeline, dtype=dtype)


def test_an_autoencoder_in_float32_stands_beside_a_denoiser_in_float16() -> None:
    half, exact = make("float16"), make("float32")
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        encoded = [backbone.encode_pictures(pixels) for backbone in (half, exact)]
    assert all(torch.equal(one, other) for one, other in zip(*encoded, strict=True))

    drawn = [draw_pictures(backbone, ["a cat"], [0], steps=2)[0].astype(int) for backbone in (half, exact)]
    assert np.abs(drawn[0] - drawn[1]).mean() < 3
    assert {weight.dtype for weight in half.denoiser.parameters()} == {torch.float16}

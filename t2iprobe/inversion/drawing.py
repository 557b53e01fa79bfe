"""Pictures drawn while a concept is taught, by the pipeline as it is at that moment."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from t2iprobe.decoding import DecoderWatch, copy_for_a_batch
from t2iprobe.devices import inference_context
from t2iprobe.errors import UserError
from t2iprobe.inversion.backbones import Backbone
from t2iprobe.pipelines import setting_arguments
from t2iprobe.storage import remove_leftovers, write_atomically


def draw_pictures(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 16,
) -> list[np.ndarray]:
    """Return a picture uint8 [S, S, 3] for each expanded prompt and seed; None: the pipeline's default.

    Raises UserError for one that holds NaN even when its latents are decoded in float32.
    """
    drawn: list[np.ndarray] = []
    settings = setting_arguments(backbone.pipeline, steps, guidance, backbone.size)
    for start in range(0, len(prompts), batch):
        pipeline = copy_for_a_batch(backbone.pipeline)
        decoder = DecoderWatch(pipeline)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        with inference_context(backbone.device.type, backbone.dtype):
            made = pipeline(
                prompt=list(prompts[start : start + batch]),
                generator=generators,
                output_type="np",
                **settings,
            ).images
        for prompt, picture in zip(prompts[start:], decoder.mend(made), strict=False):
            if not np.isfinite(picture).all():
                raise UserError(
                    f"the picture drawn for {prompt!r} holds NaN in {backbone.dtype}: "
                    "try --dtype bfloat16 or float32"
                )
            drawn.append((picture * 255).round().clip(0, 255).astype(np.uint8))
    return drawn


def write_pictures(folder: Path, pictures: Sequence[np.ndarray]) -> list[Path]:
    """Write pictures uint8 [H, W, 3] as ``0.png``, ``1.png``, … Returns the files."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    files = [folder / f"{number}.png" for number in range(len(pictures))]
    for path, picture in zip(files, pictures, strict=True):
        content = io.BytesIO()
        Image.fromarray(picture).save(content, "PNG")
        write_atomically(path, content.getvalue())
    return files

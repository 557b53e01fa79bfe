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
from t2iprobe.inversion.memory import in_batches
from t2iprobe.pipelines import setting_arguments
from t2iprobe.storage import remove_leftovers, write_atomically


class Broken(UserError):
    """A picture that is none."""


def draw_pictures(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 16,
) -> list[np.ndarray]:
    """Return a picture uint8 [S, S, 3] for each expanded prompt and seed; None: the pipeline's default.

    So many as `batch` are drawn at once, fewer where they do not fit the memory. Raises UserError where not
    even one fits (TooLarge), or one holds NaN even when its latents are decoded in float32 (Broken).
    """
    settings = setting_arguments(backbone.pipeline, steps, guidance, backbone.size)

    def draw(part: Sequence[tuple[str, int]]) -> list[np.ndarray]:
        pipeline = copy_for_a_batch(backbone.pipeline)
        decoder = DecoderWatch(pipeline)
        with inference_context(backbone.device.type, backbone.dtype):
            made = pipeline(
                prompt=[prompt for prompt, _ in part],
                generator=[torch.Generator().manual_seed(seed) for _, seed in part],
                output_type="np",
                **settings,
            ).images
        pictures = decoder.mend(made)
        for (prompt, _), picture in zip(part, pictures, strict=True):
            if not np.isfinite(picture).all():
                raise Broken(
                    f"the picture drawn for {prompt!r} holds NaN in {backbone.dtype}: "
                    "try --dtype bfloat16 or float32"
                )
        return list((pictures * 255).round().clip(0, 255).astype(np.uint8))

    pairs = list(zip(prompts, seeds, strict=True))
    return in_batches(draw, pairs, batch, backbone.device, "a picture")


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

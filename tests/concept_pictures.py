"""Pictures of a concept, made up."""

from pathlib import Path

import numpy as np
from PIL import Image


def draw_concept(folder: Path, seed: int = 0, count: int = 3) -> Path:
    """Write a few pictures of blocks of colour into a new folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((40, 48), Image.Resampling.NEAREST).save(folder / f"{number}.png")
    return folder

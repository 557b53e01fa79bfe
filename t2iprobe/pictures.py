"""Pictures from files: any format that Pillow reads, upright, opaque."""

from pathlib import Path

import numpy as np

from t2iprobe.errors import UserError


def picture_files(folder: Path) -> list[Path]:
    """Return the files of a folder whose endings Pillow opens, sorted by name; hidden ones are left out."""
    from PIL import Image

    endings = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in endings and path.name[0] != ".")


def read_picture(path: Path, background: str = "white") -> np.ndarray:
    """Read any picture that Pillow reads, upright, its transparency onto `background`, as uint8 [H, W, 3].

    Raises UserError naming an unreadable file.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.load()
            image: Image.Image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I;16"):  # Pillow would clip it
            image = Image.fromarray((np.asarray(image, np.uint16) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"cannot read the picture {path} ({error}): repair it, remove it, or add --skip-bad"
        ) from None


def crop_square(picture: np.ndarray, size: int) -> np.ndarray:
    """Cut the centre square out of a picture uint8 [H, W, 3] and resize it to [size, size, 3] (bicubic)."""
    from PIL import Image

    height, width = picture.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    cut = Image.fromarray(picture).crop((left, top, left + side, top + side))
    return np.array(cut.resize((size, size), Image.Resampling.BICUBIC))


def resize_picture(picture: np.ndarray, side: int) -> np.ndarray:
    """Resize a picture uint8 [H, W, 3] to a square by Pillow's bicubic filter, as was published."""
    from PIL import Image

    return np.array(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))

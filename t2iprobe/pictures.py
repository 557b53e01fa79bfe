"""Pictures from files: any format that Pillow reads, upright, opaque."""

from collections.abc import Set
from pathlib import Path

import numpy as np

from t2iprobe.errors import UserError

# Pictures and films that Pillow may have no reader for. Of a camera's raw file it would read the thumbnail.
_STRANGE = {
    ".3gp", ".arw", ".avi", ".avif", ".cr2", ".cr3", ".dng", ".exr", ".hdr", ".heic", ".heif", ".hif", ".jxl",
    ".jxr", ".m4v", ".mkv", ".mov", ".mp4", ".nef", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw", ".svg",
    ".webm", ".webp", ".wmv", ".xcf",
}  # fmt: skip


def picture_files(folder: Path) -> list[Path]:
    """Return the files of a folder whose endings Pillow opens, sorted by name; hidden ones are left out."""
    return _list_files(folder, _opened_endings())


def strange_files(folder: Path) -> list[Path]:
    """Return the pictures and films of a folder that Pillow has no reader for, as `picture_files` does."""
    return _list_files(folder, _STRANGE - _opened_endings())


def _list_files(folder: Path, endings: Set[str]) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in endings and path.name[0] != ".")


def _opened_endings() -> set[str]:
    from PIL import Image

    return {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}


def read_picture(path: Path, background: str = "white") -> np.ndarray:
    """Read any picture that Pillow reads, upright, its transparency onto `background`, as uint8 [H, W, 3].

    Raises UserError naming an unreadable file.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.load()
            image: Image.Image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # Pillow would clip it
            image = Image.fromarray(_scale(np.asarray(image), image.mode, file.format))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        return np.array(image.convert("RGB"))
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot read the picture {path} ({reason}): repair it, remove it, or add --skip-bad"
        ) from None


def _scale(values: np.ndarray, mode: str, form: str | None) -> np.ndarray:
    """Return a greyscale picture of 16 bits, or of floats from 0 to 1, as uint8 [H, W].

    Raises ValueError for what may have any scale.
    """
    if mode.startswith("I;16") or (mode == "I" and form == "PPM"):  # of which Pillow makes 16 bits
        return (values.astype(np.uint16) >> 8).astype(np.uint8)
    if mode == "F" and (values >= 0).all() and (values <= 1).all():
        return (values * 255).round().astype(np.uint8)
    raise ValueError("its numbers have no certain scale: 8 or 16 bits have, and floats from 0 to 1")


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

"""A concept: its pictures, how they are captioned, and what the autoencoder makes of them, encoded once."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from t2iprobe.errors import UserError
from t2iprobe.inversion.memory import in_batches
from t2iprobe.pictures import crop_square, picture_files, read_picture, strange_files

if TYPE_CHECKING:
    from t2iprobe.inversion.backbones import Backbone

_MEDIA = ("a photo", "a rendering", "an illustration")
_FRAMES = (
    *("{} of a {{}}", "{} of the {{}}", "{} of one {{}}", "{} of my {{}}", "{} of a clean {{}}"),
    *("{} of the clean {{}}", "{} of a nice {{}}", "{} of the nice {{}}", "{} of a cool {{}}"),
    *("{} of the cool {{}}", "{} of a small {{}}", "{} of the small {{}}", "{} of a large {{}}"),
    *("{} of the large {{}}", "{} of a {{}}, close-up", "{} of the {{}}, close-up", "{} of a {{}}, cropped"),
    *("{} of a {{}}, bright", "{} of the {{}}, dark"),
)
#: Captions of an object, "{}" for its token: 19 phrases in three media.
OBJECT_TEMPLATES = tuple(frame.format(medium) for frame in _FRAMES for medium in _MEDIA)
_STYLE_MANNERS = (
    *("painting", "rendering", "picture", "clean painting", "dirty painting", "dark painting"),
    *("bright painting", "cool painting", "good painting", "nice painting", "small painting"),
    *("large painting", "weird painting", "cropped painting", "close-up painting", "cool rendering"),
    *("bright rendering", "dark picture", "nice picture"),
)
#: Captions of a style.
STYLE_TEMPLATES = tuple(f"a {manner} in the style of {{}}" for manner in _STYLE_MANNERS)
TEMPLATES = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}


@dataclass(frozen=True)
class Concept:
    """Pictures of one thing or style, and the token that will stand for it.

    `pictures` is uint8 [n, 3, S, S]. `captions` has one text a picture, or is None: then captions are drawn
    from `templates`. In both, ``{}`` is the token's place.
    """

    token: str
    pictures: torch.Tensor
    files: tuple[Path, ...]
    templates: tuple[str, ...] = OBJECT_TEMPLATES
    captions: tuple[str, ...] | None = None

    def caption(self, picture: int, rng: random.Random) -> str:
        """Return a caption of the picture at that index."""
        if self.captions is not None:
            return self.captions[picture].replace("{}", self.token)
        return rng.choice(self.templates).replace("{}", self.token)


def load_concept(
    folder: str | Path,
    token: str,
    *,
    size: int,
    templates: str | Sequence[str] = "object",
    background: str = "white",
    skip_bad: bool = False,
) -> Concept:
    """Read a folder of pictures as a concept, each cut to its centre square of `size` pixels.

    ``NAME.txt`` beside ``NAME.png`` is that picture's caption, with ``{}`` or the token in the token's
    place; where there is one, every picture needs one. `templates` is "object", "style" or texts with ``{}``.
    Raises UserError for an empty folder, an unreadable picture (skipped with `skip_bad`) or a bad caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give one with a few pictures of the concept")
    if not skip_bad and (strange := strange_files(folder)):
        raise UserError(
            f"cannot read {strange[0]}: Pillow opens no {strange[0].suffix} files here: "
            "convert it to PNG or JPEG, remove it, or add --skip-bad"
        )
    pictures, used, files = [], [], picture_files(folder)
    for file in files:
        try:
            pictures.append(crop_square(read_picture(file, background), size))
        except UserError:
            if not skip_bad:
                raise
            continue
        used.append(file)
    if not used:
        found = f"{len(files)} pictures, none of them readable" if files else "no pictures"
        raise UserError(f"{folder} holds {found}: a concept needs a few, three to five do")
    return Concept(
        token=token,
        pictures=torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(),
        files=tuple(used),
        templates=_check_templates(templates),
        captions=_read_captions(used, token),
    )


def _check_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(templates, str):
        if templates in TEMPLATES:
            return TEMPLATES[templates]
        templates = [templates]
    for template in templates:
        if "{}" not in template:
            raise UserError(
                f"the template {template!r} has no place for the token: write {{}} there, "
                f"or name {' or '.join(TEMPLATES)}"
            )
    return tuple(templates)


def _read_captions(files: Sequence[Path], token: str) -> tuple[str, ...] | None:
    beside = [file.with_suffix(".txt") for file in files]
    if not any(path.is_file() for path in beside):
        return None
    captions = []
    for path in beside:
        try:
            text = " ".join(path.read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the caption {path} ({error}): where one picture has a caption, all need one"
            ) from None
        if "{}" not in text and token not in text:
            raise UserError(f"the caption {path} names the concept nowhere: write {{}} or {token} into it")
        captions.append(text)
    return tuple(captions)


@dataclass(frozen=True)
class Moments:
    """The autoencoder's posterior of pictures and mirror images: `mean`, `std` float32 [2, n, c, h, w].

    A latent drawn from it is distributed as if the picture were encoded again at each step.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, pictures: torch.Tensor, flips: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return latents [b, c, h, w] of `pictures` [b] (indices), mirrored where `flips` [b] is 1.

        `noise` [b, c, h, w] is standard normal.
        """
        return self.mean[flips, pictures] + self.std[flips, pictures] * noise


@torch.no_grad()
def encode_moments(backbone: "Backbone", concept: Concept, batch: int = 4) -> Moments:
    """Encode a concept's pictures and their mirror images once. Raises UserError where not even one fits."""
    pixels = concept.pictures.float() / 127.5 - 1
    views = [pixels, pixels.flip(-1)]

    def encode(part: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [backbone.encode_pictures(torch.stack(list(part)))]

    encoded = [in_batches(encode, list(view), batch, backbone.device, "a picture") for view in views]
    mean, std = (
        torch.stack([torch.cat([part[which] for part in view]) for view in encoded]) for which in (0, 1)
    )
    return Moments(mean, std)

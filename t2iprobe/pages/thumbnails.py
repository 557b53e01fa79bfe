"""Pictures for a page: one strip per synset, as a data URI, small enough that the page stays small."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from t2iprobe.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Pictures = Callable[[str], Sequence[bytes | Path]]

#: All strips of one page together, in base64 characters: the page itself stays below 15 MB.
BUDGET_BYTES = 11_000_000
#: (side in pixels, pictures a synset), best first; the first that fits the budget is taken.
CHOICES = ((96, 16), (96, 8), (96, 4), (64, 8), (64, 4), (64, 3), (64, 2), (64, 1), (48, 1), (32, 1))
QUALITY = 72


@dataclass(frozen=True)
class Strip:
    """`count` square pictures side by side in one WebP file, as a ``data:`` URI."""

    uri: str
    count: int


def open_picture(source: bytes | Path, side: int) -> "Image.Image":
    """Return the middle square of a picture, at most `side` pixels wide; UserError if it cannot be read."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            picture = opened.convert("RGB")
            side = min(side, *picture.size)
            return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        name = "a kept picture" if isinstance(source, bytes) else str(source)
        advice = "it is no picture; delete it and write the report again"
        raise UserError(f"cannot read {name}: {advice}") from error


def join_pictures(sources: Sequence[bytes | Path], side: int) -> Strip:
    """Return the strip of these pictures, in their order."""
    from PIL import Image

    opened = [open_picture(source, side) for source in sources]
    side = min(picture.size[0] for picture in opened)
    strip = Image.new("RGB", (side * len(opened), side))
    for index, picture in enumerate(opened):
        strip.paste(picture.resize((side, side)), (index * side, 0))
    target = io.BytesIO()
    strip.save(target, "WEBP", quality=QUALITY, method=4)
    return Strip("data:image/webp;base64," + base64.b64encode(target.getvalue()).decode("ascii"), len(opened))


def choose_size(found: Mapping[str, Sequence[bytes | Path]], budget: int) -> tuple[int, int]:
    """Return the first choice (side, pictures a synset) that fits `budget`, judged by 24 of the synsets."""
    names = sorted(found)
    sample = names[:: max(1, len(names) // 24)]
    for side, count in CHOICES:
        size = sum(len(join_pictures(found[name][:count], side).uri) for name in sample)
        if size / len(sample) * len(names) <= budget:
            return side, count
    return CHOICES[-1]


def make_strips(names: Sequence[str], pictures: Pictures, budget: int = BUDGET_BYTES) -> dict[str, Strip]:
    """Return synset → strip for the synsets that have pictures."""
    found = {name: list(pictures(name)) for name in names}
    found = {name: sources for name, sources in found.items() if sources}
    if not found:
        return {}
    side, count = choose_size(found, budget)
    return {name: join_pictures(sources[:count], side) for name, sources in found.items()}

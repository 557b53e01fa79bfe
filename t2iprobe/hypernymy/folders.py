"""Pictures that were made elsewhere, in a folder for each synset, as a sampler of the probe."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from t2iprobe.config import DEFAULT_BATCH
from t2iprobe.devices import count_threads
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.batching import BatchSizes
from t2iprobe.pictures import picture_files, read_picture
from t2iprobe.runs import PlanEntry

if TYPE_CHECKING:
    from t2iprobe.hypernymy.hierarchy import Hierarchy


class FolderSampler:
    """Read pictures made elsewhere, ``DIR/<synset>/*``, so that any model can be probed.

    Transparent parts become white; the orientation that a camera noted is applied.
    """

    def __init__(self, folder: str | Path, *, skip_bad: bool = False, batch_size: int | None = None) -> None:
        self.folder = Path(folder)
        self.skip_bad = skip_bad
        self.workers = count_threads()
        self.sizes = BatchSizes(batch_size or DEFAULT_BATCH, lanes=self.workers)

    def stop(self) -> None:
        """Nothing: reading a batch of files is short."""

    def resume(self) -> None:
        """Nothing."""

    def sample(self, entries: Sequence[PlanEntry]) -> list[np.ndarray | None]:
        """Return a picture uint8 [H, W, 3] for each entry, whose prompt is its file's path in the folder.

        Raises UserError naming an unreadable file; with `skip_bad` its picture is None.
        """
        return [self._read(self.folder / entry.prompt) for entry in entries]

    def _read(self, path: Path) -> np.ndarray | None:
        try:
            return read_picture(path)
        except UserError as error:
            if self.skip_bad:
                return None
            raise UserError(f"{error} (without it this is another run: give another --out then)") from None


def list_pictures(folder: str | Path, hierarchy: "Hierarchy") -> dict[str, list[str]]:
    """Return synset name → its pictures' paths in `folder`, both sorted.

    Subfolders are synset names, wnids or lemmas.
    Raises UserError where a subfolder's name is no synset of the hierarchy, or there is no picture at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give one with a subfolder of pictures for each synset")
    pictures: dict[str, list[str]] = {}
    for subfolder in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
        if found := picture_files(subfolder):
            name = hierarchy.resolve(subfolder.name)
            pictures.setdefault(name, []).extend(path.relative_to(folder).as_posix() for path in found)
    if not pictures:
        raise UserError(f"{folder} holds no pictures: they are looked for in {folder}/<synset>/*")
    return {name: pictures[name] for name in sorted(pictures)}

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2iprobe.errors import UserError
from t2iprobe.hypernymy.folders import FolderSampler, list_pictures
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.pictures import read_picture
from t2iprobe.plans import PlanEntry, build_plan


def write_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, ending in (("dog.n.01", "png"), ("n02121808", "jpg"), ("bird", "webp"), ("bird", "bmp")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 30, 3)).astype(np.uint8)).save(
            folder / name / f"a.{ending}"
        )


def test_a_folder_is_read_by_name_wnid_and_lemma(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    (tmp_path / "bird" / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden").mkdir()

    found = list_pictures(tmp_path, Hierarchy.imagenet())

    assert found == {
        "bird.n.01": ["bird/a.bmp", "bird/a.webp"],
        "dog.n.01": ["dog.n.01/a.png"],
        "domestic_cat.n.01": ["n02121808/a.jpg"],
    }
    entries = build_plan([{"samples": 1, "prompts": {k: {p: p for p in v} for k, v in found.items()}}], 0)
    pictures = FolderSampler(tmp_path).sample(entries)
    assert [picture.shape for picture in pictures if picture is not None] == [(20, 30, 3)] * 4


def test_folders_that_are_no_synset_and_empty_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no pictures"):
        list_pictures(tmp_path, Hierarchy.imagenet())
    with pytest.raises(UserError, match="there is no folder"):
        list_pictures(tmp_path / "none", Hierarchy.imagenet())
    write_pictures(tmp_path)
    (tmp_path / "dog.n.01").rename(tmp_path / "dgo.n.01")
    with pytest.raises(UserError, match=r"did you mean.* dog\.n\.01"):
        list_pictures(tmp_path, Hierarchy.imagenet())


def test_a_corrupt_picture_is_named_or_skipped(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    file = tmp_path / "dog.n.01" / "a.png"
    file.write_bytes(file.read_bytes()[:300])
    entry = PlanEntry("dog.n.01", "dog.n.01/a.png", 0, "dog.n.01/a.png", 0)

    with pytest.raises(UserError, match=r"cannot read the picture .*dog\.n\.01/a\.png.* another --out"):
        FolderSampler(tmp_path).sample([entry])
    assert FolderSampler(tmp_path, skip_bad=True).sample([entry]) == [None]


def test_transparency_orientation_grey_and_depth_are_understood(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png")[0, :2].tolist() == [[255, 0, 0], [255, 255, 255]]

    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # lies on its side
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").shape == (8, 4, 3)

    Image.fromarray(np.full((2, 2), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png").tolist() == [[[156] * 3] * 2] * 2

    Image.new("P", (2, 2)).save(tmp_path / "palette.gif")
    assert read_picture(tmp_path / "palette.gif").shape == (2, 2, 3)

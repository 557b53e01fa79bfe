import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from t2iprobe.errors import UserError
from t2iprobe.pictures import read_picture, resize_picture

RAMP = np.tile(np.arange(0, 65536, 256, dtype=np.uint16), (8, 1))  # from black to white


def test_resize_is_pillows_bicubic() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (48, 48, 3)).astype(np.uint8)

    expected = np.asarray(Image.fromarray(picture).resize((20, 20), Image.Resampling.BICUBIC))

    assert np.array_equal(resize_picture(picture, 20), expected)


def test_deep_greyscale_is_scaled(tmp_path: Path) -> None:
    (tmp_path / "16.pgm").write_bytes(b"P5 256 8 65535\n" + RAMP.astype(">u2").tobytes())
    (tmp_path / "10.pgm").write_bytes(b"P5 256 8 1023\n" + (RAMP >> 6).astype(">u2").tobytes())
    Image.fromarray(RAMP).save(tmp_path / "16.png")
    Image.fromarray(RAMP).save(tmp_path / "16.tif")
    Image.fromarray((RAMP / RAMP.max()).astype(np.float32)).save(tmp_path / "float.tif")

    for path in tmp_path.iterdir():
        read = read_picture(path).astype(int)
        assert read.shape == (8, 256, 3)
        assert np.abs(read[0, :, 1] - np.arange(256)).max() <= 1, path.name


@pytest.mark.parametrize("values", [RAMP.astype(np.int32), RAMP.astype(np.float32), RAMP * np.float32("nan")])
def test_numbers_without_a_certain_scale_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "deep.tif")
    with pytest.raises(UserError, match=r"deep\.tif \(its numbers have no certain scale"):
        read_picture(tmp_path / "deep.tif")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["AVIF", "BLP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP"])
def test_a_damaged_picture_is_read_or_named(tmp_path: Path, form: str) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    rng, whole = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (16, 24), np.uint8)).convert("P" if form == "BLP" else "RGB").save(
        whole, form
    )
    path, told = tmp_path / "damaged", []
    for number in range(120):
        content = np.frombuffer(whole.getvalue(), np.uint8).copy()
        if number % 3:
            content[rng.integers(0, min(len(content), 400), 6)] = rng.integers(0, 256, 6)
        else:
            content = content[: rng.integers(len(content))]
        path.write_bytes(content.tobytes())
        try:
            assert read_picture(path).dtype == np.uint8
        except UserError as error:
            told.append(str(error))
    assert told
    assert not any("\n" in line for line in told)

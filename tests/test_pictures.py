import numpy as np
from PIL import Image

from t2iprobe.pictures import resize_picture


def test_resize_is_pillows_bicubic() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (48, 48, 3)).astype(np.uint8)

    expected = np.asarray(Image.fromarray(picture).resize((20, 20), Image.Resampling.BICUBIC))

    assert np.array_equal(resize_picture(picture, 20), expected)

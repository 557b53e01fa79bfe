from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2iprobe.errors import UserError
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.sampling import (
    DiffusersSampler,
    FolderSampler,
    list_pictures,
    read_picture,
    resize_picture,
)
from t2iprobe.pipelines import Pipeline, place_pipeline
from t2iprobe.runs import PlanEntry, build_plan
from t2iprobe.testing import FAMILIES, tiny_pipeline

PROMPTS = {f"thing.n.{i:02d}": {"base": f"An image of a thing {i}."} for i in range(4)}
PLAN = build_plan([{"samples": 2, "prompts": PROMPTS}], 0)


def make_sampler(family: str = "sd", dtype: str = "float32") -> DiffusersSampler:
    pipeline = tiny_pipeline(family)
    place_pipeline(pipeline, "cpu", dtype)
    return DiffusersSampler(pipeline, steps=4, guidance=5.0, dtype=dtype)


def draw(sampler: DiffusersSampler, entries: list[PlanEntry], batch: int) -> np.ndarray:
    batches = (sampler.sample(entries[start : start + batch]) for start in range(0, len(entries), batch))
    return np.stack([picture for pictures in batches for picture in pictures])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_is_the_same_in_any_batch_and_order(family: str) -> None:
    sampler = make_sampler(family)
    alone = draw(sampler, PLAN, 1)

    assert alone.shape == (8, 32, 32, 3)
    assert alone.dtype == np.uint8
    assert np.array_equal(draw(sampler, PLAN, 3), alone)
    assert np.array_equal(draw(make_sampler(family), PLAN[::-1], 16)[::-1], alone)
    assert len({picture.tobytes() for picture in alone}) == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_batches_agree_and_are_near_float32(family: str) -> None:
    half = make_sampler(family, "bfloat16")
    alone, together = draw(half, PLAN, 1).astype(int), draw(half, PLAN, 16).astype(int)
    exact = draw(make_sampler(family), PLAN, 1).astype(int)

    # How sums are ordered in a batch depends on the processor (AMX has tiles), but moves a picture less than
    # the rounding of bfloat16 itself does.
    assert np.abs(alone - together).mean() < 0.5 * np.abs(alone - exact).mean()
    assert np.abs(alone - together).max() <= max(2, np.abs(alone - exact).max())
    assert np.abs(alone - exact).mean() < 3


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_pictures_are_those_of_the_plain_call(family: str) -> None:
    pipeline = tiny_pipeline(family)
    generators = [torch.Generator().manual_seed(entry.seed) for entry in PLAN[:2]]
    plain = pipeline(
        prompt=[entry.prompt for entry in PLAN[:2]],
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=generators,
        output_type="np",
    ).images

    drawn = np.stack(make_sampler(family).sample(PLAN[:2]))

    assert np.abs(drawn - plain * 255).max() <= 1


def test_each_prompt_is_encoded_once_and_nothing_twice() -> None:
    sampler = make_sampler()
    texts: list[int] = []
    sampler.pipeline.text_encoder.register_forward_hook(
        lambda _, inputs, output: texts.append(len(inputs[0]))
    )

    draw(sampler, PLAN, 3)

    assert sum(texts) == len(PROMPTS) + 1  # the unconditional one


def break_decoder(pipeline: Pipeline, factor: float) -> None:
    """Scale the decoder's first layer up: its later norms do not care, but float16 overflows in between."""
    pipeline.vae.decoder.conv_in.weight.data *= factor
    pipeline.vae.decoder.conv_in.bias.data *= factor


def test_a_picture_that_overflows_float16_is_decoded_again() -> None:
    def make(dtype: str) -> Pipeline:
        pipeline = tiny_pipeline()
        break_decoder(pipeline, 1e5)
        place_pipeline(pipeline, "cpu", dtype)
        return pipeline

    def sample(dtype: str) -> np.ndarray:
        return np.stack(DiffusersSampler(make(dtype), steps=2, guidance=2.0, dtype=dtype).sample(PLAN[:2]))

    plain = make("float16")(PLAN[0].prompt, num_inference_steps=2, output_type="np").images
    half = sample("float16").astype(int)

    assert np.isnan(plain).any()
    assert np.abs(half - sample("float32")).mean() < 3
    assert half.std() > 5


def test_a_picture_that_stays_nan_is_named() -> None:
    sampler = make_sampler()
    sampler.pipeline.vae.decoder.conv_out.bias.data[:] = float("nan")

    with pytest.raises(UserError, match=r"base-0000 of thing\.n\.00 \('An image of a thing 0\.'\) holds NaN"):
        sampler.sample(PLAN[:2])


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

    with pytest.raises(UserError, match=r"cannot read the picture .*dog\.n\.01/a\.png"):
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


def test_resize_is_pillows_bicubic() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (48, 48, 3)).astype(np.uint8)

    expected = np.asarray(Image.fromarray(picture).resize((20, 20), Image.Resampling.BICUBIC))

    assert np.array_equal(resize_picture(picture, 20), expected)

"""A folder becomes a concept; its latents are drawn as if the autoencoder ran at each step."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from concept_pictures import draw_concept
from PIL import Image
from scipy import stats

from t2iprobe.errors import UserError
from t2iprobe.inversion.backbones import make_backbone
from t2iprobe.inversion.concepts import (
    OBJECT_TEMPLATES,
    STYLE_TEMPLATES,
    encode_moments,
    load_concept,
)
from t2iprobe.testing import tiny_pipeline


def test_templates_are_as_many_as_published_and_differ() -> None:
    assert len(set(OBJECT_TEMPLATES)) == 57
    assert len(set(STYLE_TEMPLATES)) == 19
    assert all(text.count("{}") == 1 for text in OBJECT_TEMPLATES + STYLE_TEMPLATES)


def test_pictures_are_read_upright_opaque_and_cut_to_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (255, 0, 0)  # the centre square is red
    Image.fromarray(wide).save(tmp_path / "a.WEBP", lossless=True)
    clear = np.zeros((10, 10, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "b.png")
    tall = Image.fromarray(np.swapaxes(wide, 0, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    tall.save(tmp_path / "c.jpg", exif=exif, quality=100, subsampling=0)
    (tmp_path / "notes.md").write_text("not a picture")
    concept = load_concept(tmp_path, "<cat>", size=16, background="blue")
    assert [path.name for path in concept.files] == ["a.WEBP", "b.png", "c.jpg"]
    assert concept.pictures.shape == (3, 3, 16, 16)
    middle = concept.pictures[:, :, 8, 8].tolist()
    assert middle[0] == [255, 0, 0]
    assert middle[1] == [0, 0, 255]
    assert middle[2][0] > 240


def test_captions_beside_the_pictures_are_used(concept_folder: Path) -> None:
    for number in range(3):
        (concept_folder / f"{number}.txt").write_text(f"view {number} of {{}}\n")
    concept = load_concept(concept_folder, "<cat>", size=16)
    assert concept.caption(2, random.Random(0)) == "view 2 of <cat>"


def test_a_missing_or_nameless_caption_is_told(concept_folder: Path) -> None:
    (concept_folder / "0.txt").write_text("view of {}")
    with pytest.raises(UserError, match=r"1\.txt.*all need one"):
        load_concept(concept_folder, "<cat>", size=16)
    for number in range(3):
        (concept_folder / f"{number}.txt").write_text("a view of it")
    with pytest.raises(UserError, match=r"write \{\} or <cat>"):
        load_concept(concept_folder, "<cat>", size=16)


def test_bad_folders_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        load_concept(tmp_path / "none", "<cat>", size=16)
    with pytest.raises(UserError, match="no pictures"):
        load_concept(tmp_path, "<cat>", size=16)
    folder = draw_concept(tmp_path / "cat")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[:60])
    with pytest.raises(UserError, match=r"1\.png.*--skip-bad"):
        load_concept(folder, "<cat>", size=16)
    assert len(load_concept(folder, "<cat>", size=16, skip_bad=True).pictures) == 2
    with pytest.raises(UserError, match="no place for the token"):
        load_concept(folder, "<cat>", size=16, templates=["a cat"], skip_bad=True)


def test_pictures_that_pillow_has_no_reader_for_are_named(concept_folder: Path) -> None:
    for name in ("0.txt.json", "notes.txt", ".hidden.heic", "Thumbs.db"):
        (concept_folder / name).write_text("{}")
    assert len(load_concept(concept_folder, "<cat>", size=16).files) == 3
    (concept_folder / "IMG_1.HEIC").write_bytes(b"anything")
    with pytest.raises(
        UserError, match=r"cannot read .*IMG_1\.HEIC: Pillow opens no \.HEIC files.*--skip-bad"
    ):
        load_concept(concept_folder, "<cat>", size=16)
    assert len(load_concept(concept_folder, "<cat>", size=16, skip_bad=True).files) == 3


def test_cached_moments_give_the_latents_that_encoding_each_time_gives(concept_folder: Path) -> None:
    pipeline = tiny_pipeline("sd")
    backbone = make_backbone(pipeline)
    concept = load_concept(concept_folder, "<cat>", size=backbone.size)
    moments = encode_moments(backbone, concept)
    assert moments.mean.shape[:2] == (2, 3)
    pixels = (concept.pictures.float() / 127.5 - 1)[[1]].flip(-1)
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
    count = 4000
    generator = torch.Generator().manual_seed(0)
    again = torch.stack([posterior.sample(generator) for _ in range(count)])[:, 0]
    again *= pipeline.vae.config.scaling_factor
    noise = torch.randn(count, *moments.mean.shape[2:], generator=generator)
    cached = moments.sample(torch.full((count,), 1), torch.full((count,), 1), noise)
    assert cached.shape == again.shape
    spots = torch.randperm(again[0].numel(), generator=generator)[:20]
    for spot in spots:
        test = stats.ks_2samp(again.flatten(1)[:, spot], cached.flatten(1)[:, spot])
        assert test.pvalue > 1e-4
    unmirrored = moments.sample(torch.full((count,), 1), torch.zeros(count, dtype=torch.long), noise)
    worst = min(stats.ks_2samp(again.flatten(1)[:, s], unmirrored.flatten(1)[:, s]).pvalue for s in spots)
    assert worst < 1e-6  # the test can fail: the mirror image is another picture


def test_pictures_are_encoded_one_by_one_where_the_memory_is_too_small(concept_folder: Path) -> None:
    backbone = make_backbone(tiny_pipeline("sd"))
    concept = load_concept(concept_folder, "<cat>", size=32)
    whole = encode_moments(backbone, concept)

    def limit(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        if len(given[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    backbone.autoencoder.encoder.register_forward_pre_hook(limit)
    parts = encode_moments(backbone, concept)
    assert torch.allclose(parts.mean, whole.mean, atol=1e-5)
    assert torch.allclose(parts.std, whole.std, atol=1e-5)

"""Pictures of captions: drawn once, resumed, and scored by tiny networks against brute force."""

import json
import random

import numpy as np
import pytest
import torch
from clip_toy import save_clip
from PIL import Image
from report_example import make_pictures
from scipy.linalg import sqrtm
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.config import load_study
from t2iprobe.errors import UserError
from t2iprobe.hypernymy import coco as module
from t2iprobe.hypernymy.coco import (
    choose_captions,
    frechet_distance,
    load_inception,
    run_coco,
    score_captions,
)
from t2iprobe.hypernymy.sampling import DiffusersSampler
from t2iprobe.runs import PlanEntry, picture_seed

CAPTIONS = [f"a thing, number {k}" for k in range(7)]


def make_study(model, **settings):
    return load_study(
        None, {"model": str(model), "steps": 2, "guidance": 3.0, "dtype": "float32", **settings}
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny")


def test_captions_are_the_published_draw(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"annotations": [{"caption": text} for text in CAPTIONS]}))
    random.seed(0)  # as published
    assert choose_captions(tmp_path / "c.json", 3) == random.sample(CAPTIONS, 3)
    assert choose_captions(tmp_path / "c.json", 7) == CAPTIONS
    (tmp_path / "c.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no captions"):
        choose_captions(tmp_path / "c.txt")


def test_pictures_are_drawn_once_and_are_the_samplers(tiny_model, tmp_path, monkeypatch):
    study, out = make_study(tiny_model, seed=3, batch_size=2), tmp_path / "out"
    sample, drawn = DiffusersSampler.sample, []

    def stop(self, entries):
        if len(drawn) >= 4:
            raise KeyboardInterrupt
        drawn.extend(entry.index for entry in entries)
        return sample(self, entries)

    monkeypatch.setattr(DiffusersSampler, "sample", stop)
    with pytest.raises(KeyboardInterrupt):
        run_coco(study, CAPTIONS, out)
    assert len(list(out.glob("pictures/*.png"))) == 4
    assert not (out / "results.json").exists()
    told = []
    monkeypatch.setattr(
        DiffusersSampler, "sample", lambda s, e: drawn.extend(x.index for x in e) or sample(s, e)
    )
    results = run_coco(study, CAPTIONS, out, progress=lambda done, of: told.append((done, of)))
    assert drawn == list(range(7))
    assert told == [(6, 7), (7, 7)]
    assert results["pictures"] == 7
    sampler = module.load_sampler(study, "cpu", "float32")
    entry = PlanEntry("caption", "caption", 5, CAPTIONS[5], picture_seed(3, CAPTIONS[5], "caption", 5))
    np.testing.assert_array_equal(
        np.asarray(Image.open(out / "pictures" / "000005.png")), sample(sampler, [entry])[0]
    )
    for other, message in (
        (make_study(tiny_model, seed=4), "another seed"),
        (make_study(tiny_model, steps=3, seed=3), "another steps"),
    ):
        with pytest.raises(UserError, match=message):
            run_coco(other, CAPTIONS, out)
    with pytest.raises(UserError, match="another captions"):
        run_coco(study, CAPTIONS[:3], out)
    with pytest.raises(UserError, match="no folder of real pictures"):
        run_coco(study, CAPTIONS, tmp_path / "new", real=tmp_path / "none")
    assert not (tmp_path / "new").exists()


class Colours(torch.nn.Module):
    """Features of a picture: the means of its colours and of two corners."""

    def forward(self, pictures):
        assert pictures.dtype == torch.uint8
        values = pictures.float() / 255
        parts = (values, values[..., :8, :8], values[..., -8:, -8:])
        return torch.cat([part.mean(dim=(2, 3)) for part in parts], dim=1)


def test_fid_is_the_frechet_distance_of_the_features():
    pytest.importorskip("torchmetrics")
    real, drawn = make_pictures(60, 1), make_pictures(40, 2) // 2
    found = frechet_distance(iter(real), iter(drawn), Colours(), 9)
    assert (found["real"], found["drawn"]) == (60, 40)

    def moments(pictures):
        features = Colours()(torch.from_numpy(pictures).permute(0, 3, 1, 2)).double().numpy()
        return features.mean(axis=0), np.cov(features, rowvar=False)

    (mean_a, cov_a), (mean_b, cov_b) = moments(real), moments(drawn)
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert found["value"] == pytest.approx(expected, rel=1e-3)
    assert frechet_distance(iter(real), iter(real), Colours(), 9)["value"] == pytest.approx(0, abs=1e-3)
    with pytest.raises(UserError, match="two pictures at least"):
        frechet_distance(iter(real), iter(drawn[:1]), Colours(), 9)


def test_clip_score_is_a_hundredth_of_the_cosine_in_percent(clip, tmp_path):
    pytest.importorskip("torchmetrics")
    from transformers import CLIPModel, CLIPProcessor

    pictures, texts = make_pictures(4, 0), ["a dog", "two owls", "red", "a thing"]
    paths = [tmp_path / f"{k}.png" for k in range(4)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    network, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    inputs = processor(
        text=texts, images=[Image.open(path) for path in paths], return_tensors="pt", padding=True
    )
    with torch.inference_mode():
        cosines = network(**inputs).logits_per_image.diagonal() / network.logit_scale.exp()
    found = score_captions(paths, texts, str(clip), "cpu")
    assert found["value"] == pytest.approx(cosines.clamp(min=0).mean().item(), abs=2e-3)
    assert found["pictures"] == 4
    with pytest.raises(UserError, match="cannot load the CLIP .*--clip FOLDER"):
        score_captions(paths, texts, str(tmp_path), "cpu")


def test_inception_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    with pytest.raises(UserError, match="there is no file of Inception's weights"):
        load_inception(tmp_path / "none.pth", "cpu")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot load Inception's weights"):
        load_inception(tmp_path / "bad.pth", "cpu")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot download Inception's weights .*--inception"):
        load_inception(None, "cpu")


def test_inception_loads_from_a_file(tmp_path):
    """Random weights of the very network: the path from file to distance."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    captured = {}
    original = torch.nn.Module.load_state_dict

    def capture(self, state, *more, **named):
        captured["names"] = set(self.state_dict())
        return original(self, self.state_dict())

    empty = tmp_path / "empty.pth"
    torch.save({}, empty)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", capture)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(empty))
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    extractor = load_inception(tmp_path / "inception.pth", "cpu")
    pictures = torch.from_numpy(make_pictures(2, 0)).permute(0, 3, 1, 2)
    assert extractor(pictures).shape == (2, 2048)


def test_the_command(tiny_model, clip, tmp_path):
    pytest.importorskip("torchmetrics")
    (tmp_path / "c.txt").write_text("\n".join(CAPTIONS))
    words = ["hypernymy", "coco", str(tmp_path / "c.txt"), "--model", str(tiny_model), "--count", "3"]
    words += [
        "--set",
        "steps=2",
        "--set",
        "dtype=float32",
        "--clip",
        str(clip),
        "--out",
        str(tmp_path / "out"),
    ]
    plan = CliRunner().invoke(app, [*words, "--dry-run", "--json"], catch_exceptions=False)
    assert json.loads(plan.stdout)["pictures"] == 3
    assert json.loads(plan.stdout)["predicted_seconds"] > 0
    assert not (tmp_path / "out").exists()
    shown = CliRunner().invoke(app, words, catch_exceptions=False)
    assert shown.stdout.startswith("3 pictures in")
    assert "CLIPScore" in shown.stdout
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["clip_score"]["pictures"] == 3

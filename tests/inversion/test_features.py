import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from t2iprobe.classifiers import load_classifier
from t2iprobe.errors import UserError
from t2iprobe.inversion import features as module
from t2iprobe.inversion.features import ClassifierFeatures, ClipFeatures, load_features, normalise


def make_pictures(count: int, side: int = 64) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]


@pytest.fixture(scope="module")
def packaged() -> ClassifierFeatures:
    features = load_features("classifier", "cpu")
    assert isinstance(features, ClassifierFeatures)
    return features


def test_classifier_features_are_what_its_last_layer_reads(packaged: ClassifierFeatures) -> None:
    pictures = make_pictures(3)
    last = packaged.classifier._network.classifier

    read = packaged.classifier.features(pictures)
    with torch.inference_mode():
        logits = last(torch.from_numpy(read)).numpy()

    assert logits == pytest.approx(packaged.classifier.score(pictures), abs=1e-4)
    assert np.linalg.norm(packaged.pictures(pictures), axis=1) == pytest.approx(np.ones(3), abs=1e-6)
    assert packaged.texts(["a cat"]) is None
    assert packaged.name == "EfficientNet-Lite0"


def test_features_and_probabilities_do_not_depend_on_the_batch(
    packaged: ClassifierFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [*make_pictures(3), *make_pictures(2, 96)]
    whole, probabilities = packaged.pictures(pictures), packaged.probabilities(pictures)
    monkeypatch.setattr(module, "BATCH", 2)

    assert np.abs(packaged.pictures(pictures) - whole).max() < 1e-5
    assert np.abs(packaged.probabilities(pictures) - probabilities).max() < 1e-5
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(5), abs=1e-5)


def test_features_of_any_timm_network(tmp_path: Path) -> None:
    network = timm.create_model("resnet10t", pretrained=False).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    features = ClassifierFeatures(
        load_classifier(f"timm:resnet10t@{tmp_path / 'weights.pth'}", device="cpu", dtype="float32")
    )

    assert features.pictures(make_pictures(2)).shape == (2, network.num_features)


def test_a_zero_vector_stays_zero() -> None:
    assert normalise(np.array([[0.0, 0.0], [3.0, 4.0]])).tolist() == [
        [0, 0],
        pytest.approx([0.6, 0.8]),
    ]


class FakeClip(torch.nn.Module):
    """Encodes a picture as the mean of its colours, a text as its length."""

    def encode_image(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.mean(dim=(2, 3))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.float() * torch.tensor([3.0, 4.0, 0.0])


@pytest.fixture
def open_clip(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for open_clip: it knows one network, and loads any file that does not say otherwise."""
    fake = types.ModuleType("open_clip")
    fake.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    fake.loaded = []

    def create(name: str, *, pretrained: str, device: str) -> tuple:
        fake.loaded.append((name, pretrained))
        if pretrained == "openai":
            raise OSError("no network here")
        return FakeClip(), lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    fake.create_model_from_pretrained = create
    fake.list_models = lambda: ["ViT-B-32", "ViT-B-16"]
    fake.list_pretrained_tags_by_model = lambda name: ["openai", "laion2b"]
    fake.get_tokenizer = lambda name: lambda texts: torch.tensor([[len(text)] for text in texts])
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    return fake


def test_clip_compares_pictures_with_texts(open_clip: types.ModuleType, tmp_path: Path) -> None:
    (tmp_path / "clip.pt").touch()
    features = load_features(f"clip:ViT-B-32:{tmp_path / 'clip.pt'}", "cpu")
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200

    assert features.name == "CLIP ViT-B-32 (clip.pt)"
    assert features.pictures([red])[0] == pytest.approx([1, 0, 0])
    assert features.texts(["a", "bb"])[1] == pytest.approx([0.6, 0.8, 0])


def test_auto_takes_clip_only_where_its_file_is_named(
    open_clip: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packaged: ClassifierFeatures
) -> None:
    monkeypatch.setattr(module, "load_classifier", lambda *_, **__: packaged.classifier)
    monkeypatch.delenv(module.VARIABLE, raising=False)
    assert isinstance(load_features("auto", "cpu"), ClassifierFeatures)

    monkeypatch.setenv(module.VARIABLE, f"ViT-B-16:{tmp_path / 'weights.pt'}")
    assert isinstance(load_features("auto", "cpu"), ClassifierFeatures)

    (tmp_path / "weights.pt").touch()
    assert isinstance(load_features("auto", "cpu"), ClipFeatures)
    assert open_clip.loaded == [("ViT-B-16", str(tmp_path / "weights.pt"))]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("klip", "there are no features 'klip': use 'auto'"),
        (
            "clip",
            r"cannot load openai into CLIP ViT-B-32 \(OSError: no network here\): .*give clip:ViT-B-32:FILE",
        ),
        ("clip:ViT-B-33", "no network 'ViT-B-33', did you mean ViT-B-32"),
        ("clip:ViT-B-32:laion2", "no weights file laion2.*did you mean laion2b"),
    ],
)
def test_features_that_cannot_be_had_are_told_in_one_line(
    spec: str, message: str, open_clip: types.ModuleType
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load_features(spec, "cpu")

    assert "\n" not in str(raised.value)


def test_without_open_clip_its_features_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)

    with pytest.raises(UserError, match=r"pip install 't2iprobe\[clip\]'"):
        load_features("clip", "cpu")

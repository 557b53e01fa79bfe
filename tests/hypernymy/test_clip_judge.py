"""CLIP as a judge: its measures by hand, and whole judgements by tiny CLIPs that are really loaded."""

import csv
import json

import numpy as np
import pytest
import torch
from clip_toy import save_clip
from PIL import Image
from report_example import make_pictures, make_run
from scipy.stats import spearmanr
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.clip import load_clip
from t2iprobe.errors import UserError
from t2iprobe.hypernymy import clip_judge as module
from t2iprobe.hypernymy.clip_judge import judge_pictures, list_relatives, measure_likeness
from t2iprobe.hypernymy.report import write_report

SYNSETS = ["dog.n.01", "bird.n.01", "vehicle.n.01", "fruit.n.01", "insect.n.01", "hat.n.01"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random CLIP of transformers, as save_pretrained writes it."""
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = make_run(tmp_path_factory.mktemp("runs") / "run", SYNSETS, classifiers=("embedded", "timm:other"))
    write_report(made)
    return made


def test_measures_by_hand():
    pictures = np.array([[1.0, 0.0], [0.6, 0.8]])
    lemma, hypernyms = np.array([1.0, 0.0]), np.array([[0.0, 1.0], [0.8, 0.6]])
    cohyponyms = np.array([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    found = measure_likeness(pictures, lemma, hypernyms, cohyponyms)
    assert found["lemma"] == pytest.approx((1 + 0.6) / 2)
    assert found["hypernym"] == pytest.approx((0 + 0.8 + 0.8 + 0.96) / 4)
    assert found["cohyponym"] == pytest.approx((0.6 + 0 + 1 + 1 + 0.8 + 0.6) / 6)
    assert found["specificity"] == pytest.approx(0.64 / (4 / 6))
    assert found["beats"] == pytest.approx((1 + 1 + 0.5 + 0 + 0 + 0.5) / 6)
    alone = measure_likeness(pictures, lemma, None, None)
    assert (alone["hypernym"], alone["cohyponym"], alone["specificity"], alone["beats"]) == (None,) * 4
    assert measure_likeness(pictures, lemma, hypernyms, -cohyponyms)["specificity"] is None


def test_relatives_are_those_of_wordnet():
    hypernyms, cohyponyms = list_relatives("dog.n.01")
    assert hypernyms == ["canine.n.02", "domestic_animal.n.01"]
    assert "wolf.n.01" in cohyponyms  # another canine
    assert "dog.n.01" not in cohyponyms
    assert list_relatives("entity.n.01") == ([], [])


def test_a_folder_of_transformers_is_what_its_own_network_says(folder):
    from transformers import CLIPModel, CLIPProcessor

    network, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    pictures = [Image.fromarray(picture) for picture in make_pictures(3, 0)]
    features = load_clip(f"clip:{folder}", "cpu")
    with torch.inference_mode():
        both = network(
            **processor(text=["a dog", "an owl"], images=pictures, return_tensors="pt", padding=True)
        )
    ours = (
        features.pictures([np.asarray(picture) for picture in pictures])
        @ features.texts(["a dog", "an owl"]).T
    )
    scale = network.logit_scale.exp().item()
    assert ours == pytest.approx(both.logits_per_image.numpy() / scale, abs=1e-5)


def test_a_run_is_judged_and_goes_on_after_a_kill(run, folder, monkeypatch):
    found = judge_pictures(run.path, f"clip:{folder}", device="cpu")
    assert [row["synset"] for row in found["synsets"]] == sorted(SYNSETS)
    assert {row["samples"] for row in found["synsets"]} == {4}
    (stored,) = run.path.glob("judges/*.json")
    assert json.loads(stored.read_text()) == found
    rows = list(csv.DictReader(stored.with_suffix(".csv").open()))
    assert float(rows[0]["lemma"]) == found["synsets"][0]["lemma"]
    values = [row["lemma"] for row in found["synsets"]]
    assert found["means"]["lemma"]["value"] == pytest.approx(np.mean(values))
    # a random network's cosines may be negative: the ratio is then left out
    specific = [row["specificity"] for row in found["synsets"] if row["cohyponym"] > 0]
    assert found["means"]["specificity"]["synsets"] == len(specific)
    results = json.loads((run.path / "results.json").read_text())
    isp = {row["synset"]: row["isp"] for row in results["classifiers"]["timm:other"]["synsets"]}
    agreement = {(row["classifier"], row["measure"]): row for row in found["agreement"]}
    expected = spearmanr([isp[row["synset"]] for row in found["synsets"]], values).statistic
    assert agreement["timm:other", "lemma"]["spearman"] == pytest.approx(expected)
    # a damaged and a missing file of vectors are made again, the others are read
    vectors = sorted(run.path.glob("judges/*/*.npy"))
    assert len(vectors) == len(SYNSETS)
    vectors[0].write_bytes(vectors[0].read_bytes()[:50])
    vectors[1].unlink()
    read = []
    original = module.read_picture
    monkeypatch.setattr(module, "read_picture", lambda path: read.append(path) or original(path))
    assert judge_pictures(run.path, f"clip:{folder}", device="cpu") == found
    assert len(read) == 8


def test_vectors_are_of_the_very_pictures(folder, tmp_path):
    """Two folders with as many pictures, judged into one place; then pictures replaced by others."""

    def judge(pictures, out):
        return judge_pictures(tmp_path / pictures, f"clip:{folder}", tmp_path / out, device="cpu")["synsets"]

    for seed, name in enumerate(("one", "two")):
        (tmp_path / name / "dog").mkdir(parents=True)
        Image.fromarray(make_pictures(1, seed)[0]).save(tmp_path / name / "dog" / "1.png")
    one, two = judge("one", "one.json"), judge("two", "two.json")
    assert one != two == judge("two", "alone/two.json")
    (tmp_path / "two" / "dog" / "1.png").write_bytes((tmp_path / "one" / "dog" / "1.png").read_bytes())
    assert judge("two", "two.json") == one


def test_any_synset_of_wordnet_can_be_judged(folder, tmp_path):
    for name in ("wolf_pup.n.01", "granite"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.fromarray(make_pictures(1, 1)[0]).save(tmp_path / "pictures" / name / "1.png")
    words = ["hypernymy", "judge", str(tmp_path / "pictures"), "--judge", f"clip:{folder}", "--device", "cpu"]
    shown = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "j.json")], catch_exceptions=False)
    assert shown.stdout.startswith("2 synsets by CLIP tiny\nlemma")
    found = json.loads((tmp_path / "j.json").read_text())
    assert [row["synset"] for row in found["synsets"]] == ["granite.n.01", "wolf_pup.n.01"]
    assert found["agreement"] == []
    assert CliRunner().invoke(app, words).exit_code != 0  # where to?


def test_open_clip_really_loads_a_local_checkpoint(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    name = "test-vit-tiny"
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    network = open_clip.create_model(name)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    features = load_clip(f"clip:{name}:{tmp_path / 'weights.pt'}", "cpu")
    picture = make_pictures(1, 0)[0]
    _, preprocess = open_clip.create_model_from_pretrained(name, pretrained=str(tmp_path / "weights.pt"))
    with torch.inference_mode():
        one = network.eval().encode_image(preprocess(Image.fromarray(picture))[None], normalize=True)
        other = network.encode_text(open_clip.get_tokenizer(name)(["a dog"]), normalize=True)
    assert (features.pictures([picture]) @ features.texts(["a dog"]).T).item() == pytest.approx(
        (one @ other.T).item(), abs=1e-5
    )


def test_what_cannot_be_judged_is_told(run, folder, tmp_path):
    bare = make_run(tmp_path / "bare", SYNSETS[:2], pictures=False)
    write_report(bare)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    for source, judge, message in (
        (bare.path, f"clip:{folder}", "keeps no pictures"),
        (tmp_path / "nothing", f"clip:{folder}", "there is no run or folder"),
        (tmp_path / "empty", f"clip:{folder}", "holds no pictures"),
        (run.path, "blip", "there is no CLIP 'blip': use 'clip'"),
        (run.path, f"clip:{tmp_path / 'other'}", "no CLIP of transformers: it has no config.json"),
    ):
        with pytest.raises(UserError, match=message):
            judge_pictures(source, judge, device="cpu")
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load the CLIP"):
        load_clip(f"clip:{tmp_path / 'other'}", "cpu")

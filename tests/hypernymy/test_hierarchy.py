"""The ImageNet hierarchy has the paper's counts and subtrees; other label sets work too."""

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t2iprobe.errors import UserError
from t2iprobe.hypernymy import Hierarchy
from t2iprobe.hypernymy.hierarchy import IMAGENET_TABLE

PARITY = Path(__file__).parent.parent / "parity"


@pytest.fixture(scope="module")
def imagenet():
    return Hierarchy.imagenet()


@pytest.fixture(scope="module")
def pets():
    """Five classes, of which one (dog) stands above two others."""
    return Hierarchy.from_wnids(["n02084071", "n02085620", "n02113186", "n02123045", "n02437312"])


def test_counts_of_the_paper(imagenet):
    assert len(imagenet.all_synsets) == 1860
    assert len(imagenet.synsets) == 860
    assert imagenet.subtrees.shape == (860, 1000)
    assert (imagenet.subtrees.sum(axis=1) > 1).sum() == 472
    assert imagenet.leaves == sorted(imagenet.classes)


def test_subtrees_equal_the_published_ones(imagenet):
    published = json.loads(gzip.decompress((PARITY / "imagenet_subtrees.json.gz").read_bytes()))
    ours = {
        name: np.flatnonzero(row).tolist()
        for name, row in zip(imagenet.synsets, imagenet.subtrees, strict=True)
    }
    assert ours == published


def test_packaged_table_equals_what_nltk_gives(imagenet, tmp_path):
    timm = importlib.util.find_spec("timm").submodule_search_locations[0]  # without importing torch
    wnids = (Path(timm) / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
    built = Hierarchy.from_wnids(wnids)
    built.save(tmp_path / "table.json")
    assert (tmp_path / "table.json").read_bytes() == IMAGENET_TABLE.read_bytes()
    assert built.content_hash() == imagenet.content_hash()
    assert imagenet.wnids == wnids


def test_imagenet_opens_without_nltk_and_torch():
    code = (
        "import sys; from t2iprobe.hypernymy import Hierarchy; assert Hierarchy.imagenet().subtrees.any();"
        "sys.exit(str({'nltk', 'torch', 'scipy', 'timm'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_class_labels_are_distinct(imagenet):
    assert len(set(imagenet.class_names)) == 1000
    assert imagenet.class_names[0] == "tench"
    assert imagenet.class_names[134] == "crane (wading bird)"


def test_parents_and_children_are_each_other_s_inverse(imagenet):
    links = {(parent, name) for name in imagenet.all_synsets for parent in imagenet.parents(name)}
    assert links == {(name, child) for name in imagenet.all_synsets for child in imagenet.children(name)}
    assert imagenet.parents("entity.n.01") == []
    assert imagenet.children("camel.n.01") == ["arabian_camel.n.01"]
    assert len(imagenet.descendants("entity.n.01")) == 1859


def test_subtree_of_a_class_is_the_class(imagenet):
    label = imagenet.classes.index("arabian_camel.n.01")
    assert np.flatnonzero(imagenet.subtree("arabian_camel.n.01")).tolist() == [label]
    assert imagenet.subtree("entity.n.01").all()


def test_class_above_other_classes_is_not_a_leaf(pets):
    assert "dog.n.01" in pets.synsets
    assert pets.subtree("dog.n.01").tolist() == [True, True, True, False, False]
    assert pets.leaves == ["arabian_camel.n.01", "cardigan.n.02", "chihuahua.n.03", "tabby.n.01"]


def test_hash_depends_on_the_order_of_classes(pets):
    assert Hierarchy.from_wnids(pets.wnids).content_hash() == pets.content_hash()
    assert Hierarchy.from_wnids(pets.wnids[::-1]).content_hash() != pets.content_hash()


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("dog.n.01", ["dog.n.01"]),
        ("n02084071, dog ,dog.n.01", ["dog.n.01"]),
        ("subtree:camel", ["camel.n.01", "arabian_camel.n.01"]),
        (["arabian camel", "camel.n.01"], ["arabian_camel.n.01", "camel.n.01"]),
        ("plant.n.02,plant", ["plant.n.02", "plant.n.01"]),
    ],
)
def test_select_by_name_wnid_lemma_and_subtree(imagenet, spec, names):
    assert imagenet.select(spec) == names


def test_select_sets(imagenet):
    assert imagenet.select("nonleaf") == imagenet.synsets
    assert imagenet.select("leaves") == imagenet.leaves
    assert sorted(imagenet.select("nonleaf,leaves")) == imagenet.select("all")


def test_select_lemma_takes_the_sense_that_can_be_judged(imagenet):
    # crane.n.01 is a writer; the hierarchy holds the machine (n.04) and the bird (n.05)
    assert imagenet.select("crane") == ["crane.n.04"]


def test_select_from_a_file(imagenet, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("dog.n.01  # everyone's friend\n\n# none\nsubtree:camel.n.01\n")
    assert imagenet.select(str(path)) == ["dog.n.01", "camel.n.01", "arabian_camel.n.01"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("camell", "did you mean camel.n.01"),
        ("wug", "WordNet has no synset 'wug'"),
        ("oak", "no class of the classifier lies below oak.n.01"),
        ("subtree:camell", "did you mean camel.n.01"),
        ("missing/words.txt", "no file missing/words.txt"),
        (" , ", "no synset is selected"),
    ],
)
def test_select_tells_what_is_wrong(imagenet, spec, message):
    with pytest.raises(UserError, match=message):
        imagenet.select(spec)


def test_select_refuses_a_binary_file(imagenet, tmp_path):
    (tmp_path / "words").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read synsets"):
        imagenet.select(str(tmp_path / "words"))


@pytest.mark.parametrize(
    "text",
    [
        "n02085620\nn02123045\n",
        "n02085620,small dog\nn02123045,striped cat\n",
        "\ufeffname,wnid\nsmall dog,n02085620\nstriped cat,n02123045\n",
    ],
)
def test_from_csv(tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8")
    hierarchy = Hierarchy.from_csv(path)
    assert hierarchy.classes == ["chihuahua.n.03", "tabby.n.01"]
    named = ["small dog", "striped cat"]
    assert hierarchy.class_names == (named if "small" in text else ["Chihuahua", "tabby"])
    assert hierarchy.subtree("carnivore.n.01").all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no class"),
        ("n02085620\nn02085620\n", "chihuahua.n.03 stands more than once"),
        ("n02085620\nrun.v.01\n", "run.v.01 is not a noun"),
        ("n02085620\nn00000001\n", "n00000001"),
        ("name,wnid\nsmall dog,n02085620\nstriped cat\n", "no wnid in class 2"),
    ],
)
def test_from_csv_tells_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Hierarchy.from_csv(path)


def test_from_csv_without_a_file(tmp_path):
    with pytest.raises(UserError, match="cannot read the label set"):
        Hierarchy.from_csv(tmp_path / "none.csv")

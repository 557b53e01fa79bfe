"""Captions from files, lemmas in captions by brute force, and their rank correlation with the scores."""

import csv
import gzip
import json
import re

import numpy as np
import pytest
from report_example import make_run
from scipy.stats import spearmanr
from typer.testing import CliRunner

from t2iprobe import wordnet
from t2iprobe.cli import app
from t2iprobe.errors import UserError
from t2iprobe.hypernymy import frequency as module
from t2iprobe.hypernymy.captions import read_captions
from t2iprobe.hypernymy.frequency import LemmaCounter, analyse_frequency, list_lemmas, write_frequency
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.report import write_report

CAPTIONS = [
    "Two dogs, playing!", "A DOG (brown)", "hotdog stand", "an ice-cream cone", "Ice Creams for sale",
    "ice and cream",
    "the musical instruments of a band", "a musical, instrumental piece", "power plant", "house plants",
]  # fmt: skip


def test_lemmas_are_found_in_captions():
    lemmas = {
        "dog.n.01": ["dog"],
        "ice_cream.n.01": ["ice cream"],
        "musical_instrument.n.01": ["musical instrument"],
        "plant.n.01": ["plant"],
        "plant.n.02": ["plant"],
    }
    total, counts = LemmaCounter(lemmas).count(CAPTIONS)
    assert total == 10
    assert counts == {
        "dog.n.01": 2,
        "ice_cream.n.01": 2,
        "musical_instrument.n.01": 1,
        "plant.n.01": 2,
        "plant.n.02": 2,
    }


def test_counts_are_those_of_a_regular_expression():
    rng = np.random.default_rng(0)
    names = Hierarchy.imagenet().synsets[::40]
    lemmas = list_lemmas(names, "all")
    texts = [lemma for group in lemmas.values() for lemma in group] + ["red", "two-tone", "of", "cat's", "x"]
    captions = [
        "".join(rng.choice(texts) + rng.choice([" ", ", ", "-", "; "]) for _ in range(rng.integers(1, 6)))
        for _ in range(400)
    ]
    captions += [f"many {text}s" for text in texts[:60]]
    _, counts = LemmaCounter(lemmas).count(captions)

    def names_one(caption, lemma):
        """Look at every place of the caption."""
        words, wanted = (re.sub(r"[\W_]+", " ", text.lower()).split() for text in (caption, lemma))
        return any(
            [*words[i : i + len(wanted) - 1], form] == wanted
            for i in range(len(words) - len(wanted) + 1)
            for form in module.base_forms(words[i + len(wanted) - 1])
        )

    expected = {
        name: sum(any(names_one(caption, lemma) for lemma in group) for caption in captions)
        for name, group in lemmas.items()
    }
    assert counts == {name: count for name, count in expected.items() if count}
    assert len(counts) == len(names)


def test_the_published_choice_of_synsets():
    hierarchy = Hierarchy.imagenet()
    lemmas = list_lemmas(hierarchy.synsets)
    single = [name for name, (lemma,) in lemmas.items() if " " not in lemma]
    assert len(single) == 613
    assert (hierarchy.subtrees_of(single).sum(axis=1) > 1).sum() == 331
    first = [lemma.lower() for (lemma,) in lemmas.values()]
    shared = {lemma for lemma in first if first.count(lemma) > 1}
    assert len(shared) == 25
    with pytest.raises(UserError, match="first or all"):
        list_lemmas(["dog.n.01"], "some")
    assert list_lemmas(["dog.n.01"], "all")["dog.n.01"] == [
        lemma.replace("_", " ") for lemma in wordnet.synset("dog.n.01").lemma_names()
    ]


def write_all(folder):
    rows = [{"id": k, "caption": text} for k, text in enumerate(CAPTIONS)]
    (folder / "a.txt").write_text("\n".join(CAPTIONS) + "\n\n")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a.json").write_text(json.dumps({"images": [], "annotations": rows}))
    (folder / "list.json").write_text(json.dumps(CAPTIONS))
    for ending, delimiter in ((".csv", ","), (".tsv", "\t")):
        with (folder / f"a{ending}").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "caption"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    (folder / "b.txt.gz").write_bytes(gzip.compress((folder / "a.txt").read_bytes()))
    return ["a.txt", "a.jsonl", "a.json", "list.json", "a.csv", "a.tsv", "b.txt.gz"]


def test_every_format_gives_the_same_captions(tmp_path):
    for name in write_all(tmp_path):
        assert list(read_captions(tmp_path / name)) == CAPTIONS, name
    for name in ("a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv"):  # as Windows saves them
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
        assert list(read_captions(tmp_path / name)) == CAPTIONS, name
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"url": CAPTIONS, "TEXT": CAPTIONS}), tmp_path / "a.parquet")
    assert list(read_captions(tmp_path / "a.parquet")) == CAPTIONS
    with pytest.raises(UserError, match="no column caption: it has url, TEXT"):
        list(read_captions(tmp_path / "a.parquet", "caption"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.doc", b"x", "no file of captions that is known"),
        ("a.jsonl", b'{"captoin": "x"}\n', "no column caption or text.*give one by --column"),
        ("a.jsonl", b"{", "cannot read captions"),
        ("a.jsonl", b"3\n", "neither a text nor a mapping"),
        ("a.json", b"{}", "neither a list"),
        ("a.txt", b"\xff\xfe", "cannot read captions"),
        ("a.txt.gz", b"no gzip", "cannot read captions"),
        ("a.parquet", b"no parquet", "cannot read captions"),
    ],
)
def test_bad_files_are_told(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        list(read_captions(tmp_path / name))
    assert "\n" not in str(raised.value)


@pytest.fixture
def run(tmp_path):
    names = ["dog.n.01", "bird.n.01", "vehicle.n.01", "plant.n.02", "musical_instrument.n.01", "hat.n.01"]
    made = make_run(tmp_path / "run", names, pictures=False)
    write_report(made)
    return made


def test_files_are_counted_once(run, tmp_path, monkeypatch):
    names = write_all(tmp_path)[:2]
    found = write_frequency(run, [tmp_path / name for name in names])
    assert found["captions"] == 20
    counts = {row["synset"]: row["captions"] for row in found["synsets"]}
    assert counts["dog.n.01"] == 4
    assert counts["plant.n.02"] == 4
    assert json.loads((run.path / "frequency.json").read_text()) == found
    assert (run.path / "frequency.csv").read_text().startswith("synset,lemma,captions,isp,scs\n")
    read = []
    monkeypatch.setattr(module, "read_captions", lambda path, column: read.append(path.name) or CAPTIONS)
    more = write_frequency(run, [tmp_path / name for name in [*names, "a.csv"]])
    assert read == ["a.csv"]
    assert more["captions"] == 30
    write_frequency(run, [tmp_path / "a.txt"], lemmas="all")  # other lemmas: counted again
    assert read == ["a.csv", "a.txt"]
    with pytest.raises(UserError, match="there is no file of captions"):
        write_frequency(run, [tmp_path / "none.txt"])


def test_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    names = Hierarchy.imagenet().synsets[:50]
    lemmas = list_lemmas(names)
    rows = [
        {"synset": name, "isp": float(rng.random()), "scs": float(rng.random()) if k % 3 else None}
        for k, name in enumerate(names)
    ]
    counts = dict(zip(names, rng.integers(0, 9, 50).tolist(), strict=True))
    found = analyse_frequency({"synsets": rows}, lemmas, counts)
    for part, chosen in (
        ("correlation", rows),
        ("single_word", [row for row in rows if " " not in lemmas[row["synset"]][0]]),
    ):
        for metric in ("isp", "scs"):
            pairs = [(counts[row["synset"]], row[metric]) for row in chosen if row[metric] is not None]
            ranks = found[part][metric]
            assert ranks["n"] == len(pairs)
            assert ranks["spearman"] == pytest.approx(spearmanr(*zip(*pairs, strict=True)).statistic)
            low, high = ranks["spearman_interval"]
            assert low < ranks["spearman"] < high
    assert found["never_named"] == sum(count == 0 for count in counts.values())


def test_the_command(run, tmp_path):
    write_all(tmp_path)
    words = [
        "hypernymy",
        "frequency",
        str(run.path),
        str(tmp_path / "a.txt"),
        "--out",
        str(tmp_path / "f.json"),
    ]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.stdout.startswith("10 captions; 3 synsets are named in none\nISP, all synsets: Spearman")
    assert (tmp_path / "f.csv").exists()
    shown = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert json.loads(shown.stdout)["captions"] == 10

"""Other languages: prompts by table and from a file, gaps that follow from the logits, a run of all of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from t2iprobe import wordnet
from t2iprobe.cli import app
from t2iprobe.config import load_study
from t2iprobe.errors import UserError
from t2iprobe.hypernymy import languages
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.languages import (
    add_languages,
    compare_languages,
    name_template,
    read_languages,
    read_template,
)
from t2iprobe.hypernymy.metrics import in_subtree_probability
from t2iprobe.languages import Word
from t2iprobe.runs import Run

WORDS = {
    "dog.n.01": [Word("chien", "m", "hand"), Word("toutou", "m", "hand")],
    "spider.n.01": [Word("araignée", "f", "hand")],
}


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        languages, "find_words", lambda names, language: {n: WORDS[n] for n in names if n in WORDS}
    )


def test_names() -> None:
    for key in (("base", "fr", 1), ("a {lemma}\n[x]", "de", 12)):
        assert read_template(name_template(*key)) == key
    assert read_template("base") == ("base", "en", 1)


def test_prompts_by_table() -> None:
    english = {"dog.n.01": {"base": "An image of a dog."}, "cat.n.01": {"base": "An image of a cat."}}
    found = add_languages(english, ["fr"], 2)

    assert found["dog.n.01"] == {
        "base": "An image of a dog.",
        "base [fr]": "Une image d'un chien.",
        "base [fr 2]": "Une image d'un toutou.",
    }
    assert found["cat.n.01"] == english["cat.n.01"]
    with pytest.raises(UserError, match="no synset of the run has a word in 'de'"):
        add_languages({"cat.n.01": {"base": "An image of a cat."}}, ["de"], 1)


def test_prompts_from_a_file(tmp_path: Path) -> None:
    rows = [
        {"synset": "dog.n.01", "language": "fr", "template": "base", "prompt": "un chien", "source": "a dog"},
        {"synset": "dog.n.01", "language": "es", "template": "base", "prompt": "un perro", "source": "a dog"},
        {"synset": "cat.n.01", "language": "fr", "prompt": "", "source": "a cat"},
        {"synset": "cat.n.01", "language": "fr", "prompt": "un *cat", "checks": {"ok": False}},
        {"synset": "fox.n.01", "prompt": "a fox"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert read_languages(path, ["fr"]) == {
        "dog.n.01": {"base": "a dog", "base [fr]": "un chien"}, "fox.n.01": {"prompt": "a fox"},
    }  # fmt: skip
    assert next(iter(read_languages(path, ["fr"])["dog.n.01"])) == "base"
    path.write_text(path.read_text().replace("un chien", "un\u2028chien"), encoding="utf-8-sig")
    assert read_languages(path, ["fr"])["dog.n.01"]["base [fr]"] == "un\u2028chien"
    with pytest.raises(UserError, match="has no prompt in 'de' that is ok"):
        read_languages(path, ["de"])
    path.write_text('{"synset": "dog.n.01"}\n')
    with pytest.raises(UserError, match="line 1 of .* must look like"):
        read_languages(path, ["fr"])


def test_gaps_follow_from_the_logits() -> None:
    hierarchy = Hierarchy.imagenet()
    rng = np.random.default_rng(0)
    names = ["dog.n.01", "bird.n.01", "vehicle.n.01"]
    english = {name: rng.standard_normal((6, 1000)).astype(np.float32) for name in names}
    better = {
        name: english[name] + 2.0 * mask
        for name, mask in zip(names, hierarchy.subtrees_of(names), strict=True)
    }
    second = {"dog.n.01": rng.standard_normal((6, 1000)).astype(np.float32)}
    logits = {
        "base": english, "base [fr]": {name: better[name] for name in names[:2]}, "base [fr 2]": second,
        "photo": better, "photo [fr]": english,
    }  # fmt: skip
    found = compare_languages(logits, hierarchy)
    [french] = found["languages"]
    values = {
        name: [
            in_subtree_probability(part[name], hierarchy.subtrees_of([name])[0]) for part in (english, better)
        ]
        for name in names[:2]
    }

    assert (found["template"], french["synsets"], french["of"]) == ("base", 2, 3)
    gap = np.mean([after - before for before, after in values.values()])
    assert french["isp_gap"]["value"] == pytest.approx(gap)
    assert french["isp_english"]["value"] == pytest.approx(np.mean([before for before, _ in values.values()]))
    dog = next(row for row in french["by_synset"] if row["synset"] == "dog.n.01")
    assert dog["gap"]["value"] == pytest.approx(values["dog.n.01"][1] - values["dog.n.01"][0])
    assert dog["gap"]["interval"][0] > 0  # six pairs that all rose
    assert dog["gap"]["p"] <= dog["gap"]["p_corrected"] <= 2 * dog["gap"]["p"]
    assert french["words"]["synsets"] == 1
    means = [
        in_subtree_probability(part["dog.n.01"], hierarchy.subtrees_of(["dog.n.01"])[0])
        for part in (better, second)
    ]
    assert french["words"]["variance"] == pytest.approx(np.var(means, ddof=1))


def test_a_run_in_two_languages(tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "run"
    words = [
        *("hypernymy", "run", "--model", str(tiny_model), "--synsets", "dog.n.01,spider.n.01,bird.n.01"),
        *("--samples", "2", "--steps", "2", "--language", "fr", "--words", "2", "--out", str(out)),
    ]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    plan = Run.open(out).plan
    [french] = json.loads((out / "languages.json").read_text())["languages"]

    prompts = {(entry.synset, entry.template): entry.prompt for entry in plan}
    assert prompts["spider.n.01", "base [fr]"] == "Une image d'une araignée."
    assert prompts["dog.n.01", "base [fr 2]"] == "Une image d'un toutou."
    assert ("bird.n.01", "base [fr]") not in prompts
    seeds = {}
    for entry in plan:
        seeds.setdefault((entry.synset, entry.index), set()).add(entry.seed)
    assert all(len(each) == 1 for each in seeds.values())
    assert (french["synsets"], french["of"]) == (2, 3)
    assert "from English" in done.stdout
    assert Run.open(out).manifest["identity"]["languages"] == ["fr"]


def test_settings() -> None:
    assert load_study(None, {"languages": "fr, de"}).languages == ["fr", "de"]
    assert load_study(None, {}).languages == []
    assert wordnet.synset("dog.n.01").name() in WORDS

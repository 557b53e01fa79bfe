"""Published templates word for word, templates of one's own, prompts from a file; bad ones are told."""

import pytest

from t2iprobe import wordnet
from t2iprobe.errors import UserError
from t2iprobe.hypernymy import Hierarchy, prompts


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("base", "An image of a dog."),
        ("all_lemmas", "An image of a dog (domestic dog, canis familiaris)."),
        ("photo", "a photo of a dog."),
        ("painting", "a painting of a dog."),
        ("empty", "a dog."),
        ("base_prompt", "An image of a dog."),
        ("{lemmas} | {other_lemmas}", "dog, domestic dog, canis familiaris | domestic dog, canis familiaris"),
        ("{lemma}: {gloss:.8}", "dog: a member"),
        ("{{{article}}}", "{a}"),
    ],
)
def test_render(template, text):
    assert prompts.render(template, wordnet.synset("dog.n.01")) == text


def test_article_before_a_vowel():
    orange = wordnet.synset("n07747607")
    assert prompts.render("base", orange) == "An image of an orange."
    assert prompts.render("definition", orange).startswith("An image of an orange (round yellow to orange")
    assert prompts.render("photo", orange) == "a photo of a orange."  # as published


def test_the_article_goes_by_the_sound():
    words = "a unicycle, a uniform, a utensil, an umbrella, an usher, an undergarment, a european gallinule, "
    words += "an hourglass, a honeycomb, a house, an x-ray, a one-armed bandit, an onion, an egg"
    for text in words.split(", "):
        article, lemma = text.split(" ", 1)
        assert prompts.choose_article(lemma) == article, text


def test_few_articles_differ_from_the_published_first_letter_rule():
    differ = []
    for name in Hierarchy.imagenet().all_synsets:
        lemma = wordnet.synset(name).lemma_names()[0].lower().replace("_", " ")
        if prompts.choose_article(lemma) != ("an" if lemma[0] in "aeiou" else "a"):
            differ.append(lemma)
    assert sorted(differ) == [
        "european fire salamander",
        "european gallinule",
        "hourglass",
        "unicycle",
        "uniform",
        "utensil",
    ]


def test_all_lemmas_with_one_lemma_is_the_base_prompt():
    camel = wordnet.synset("camel.n.01")
    assert camel.lemma_names() == ["camel"]
    assert prompts.render("all_lemmas", camel) == prompts.render("base", camel) == "An image of a camel."


def test_the_paper_s_count_of_synsets_with_several_lemmas():
    synsets = [wordnet.synset(name) for name in Hierarchy.imagenet().synsets]
    several = [s for s in synsets if prompts.render("all_lemmas", s) != prompts.render("base", s)]
    assert len(several) == 397


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a {colour} {lemma}", "unknown field {colour}"),
        ("a {lemma.__class__}", "unknown field"),
        ("a {}", "unknown field {}"),
        ("a {lemma", "not well formed"),
        ("a {lemma:d}", "not well formed"),
        ("a {lemma:{width}}", "not well formed"),
        ("foto", "did you mean photo"),
        ("a dog", "no template 'a dog'"),
        ("", "no template ''"),
    ],
)
def test_bad_template_is_told(template, message):
    with pytest.raises(UserError, match=message):
        prompts.render(template, wordnet.synset("dog.n.01"))


def test_read_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"synset": "dog.n.01", "prompt": "a dog in the snow"}\n\n'
        '{"synset": "camel.n.01", "prompts": ["a camel", "two camels"], "author": "me"}\n'
        '{"synset": "dog.n.01", "prompt": "ein Hund"}\n'
    )
    assert prompts.read_prompts(path) == {
        "dog.n.01": ["a dog in the snow", "ein Hund"],
        "camel.n.01": ["a camel", "two camels"],
    }


def test_only_line_breaks_end_a_prompts_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff{"synset": "dog.n.01", "prompt": "a dog\u2028in the snow"}\n', encoding="utf-8")
    assert prompts.read_prompts(path) == {"dog.n.01": ["a dog\u2028in the snow"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .* is not JSON"),
        ("[" * 100_000, "line 2 of .* is not JSON"),
        ('{"synset": "dog.n.01", "prompt": "a \\ud800"}', "line 2 of .*: half of a surrogate pair"),
        ("[]", "line 2 of .* must look like"),
        ('{"synset": "dog.n.01"}', "line 2 of"),
        ('{"synset": "dog.n.01", "prompts": []}', "line 2 of"),
        ('{"prompt": "a dog"}', "line 2 of"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"synset": "dog.n.01", "prompt": "a dog"}\n' + line)
    with pytest.raises(UserError, match=message):
        prompts.read_prompts(path)


def test_no_prompts(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no prompt"):
        prompts.read_prompts(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        prompts.read_prompts(tmp_path / "missing.jsonl")

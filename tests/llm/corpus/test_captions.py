"""What is named in a caption, and what is ballast; nouns beside nltk's own reading of WordNet."""

from importlib.resources import files

import pytest

from t2iprobe import wordnet
from t2iprobe.errors import UserError
from t2iprobe.llm.corpus import nouns as nouns_module
from t2iprobe.llm.corpus.captions import compute_caption_signals, load_token_counter, split_tags
from t2iprobe.llm.corpus.nouns import Nouns
from t2iprobe.llm.corpus.signals import stop_words


@pytest.fixture(scope="module")
def nouns() -> Nouns:
    return Nouns(stop_words("en"))


def named(nouns: Nouns, text: str) -> list[tuple[str, str]]:
    return [
        (text[each.start : each.end], wordnet.synset(f"n{each.offset:08d}").name())
        for each in nouns.find(text)
    ]


def test_mentions(nouns: Nouns) -> None:
    text = "A Red Fox sleeping on wooden benches, two women, mice; the Eiffel Tower and ice-cream"

    assert named(nouns, text) == [
        ("Red Fox", "red_fox.n.01"), ("benches", "bench.n.01"), ("women", "woman.n.01"),
        ("mice", "mouse.n.01"), ("Eiffel Tower", "eiffel_tower.n.01"),
    ]  # fmt: skip


def test_words_that_are_seldom_nouns_are_none(nouns: Nouns) -> None:
    assert named(nouns, "he is running to see a big red and in an as") == []


def test_what_is_physical_is_what_nltk_says(nouns: Nouns) -> None:
    physical = wordnet.synset("physical_entity.n.01")
    words = ["dog", "freedom", "water", "teacher", "snow", "idea", "beach", "happiness", "teapot", "music"]
    for word in words:
        [mention] = nouns.find(word)
        synset = wordnet.synset(word)
        above = {each for path in synset.hypernym_paths() for each in path}
        assert mention.offset == synset.offset()
        assert mention.physical == (physical in above), word


def test_every_noun_is_found_with_its_first_sense(nouns: Nouns) -> None:
    everything = nouns_module._read_nouns()
    reader = wordnet.reader()
    for word in list(everything)[:: len(everything) // 300]:
        assert everything[word].offset == reader.synsets(word.replace(" ", "_"), "n")[0].offset(), word


def test_concreteness_and_depictable_nouns(nouns: Nouns) -> None:
    found = compute_caption_signals("a dog, a dog and freedom", nouns, 9)

    assert found["t2i_concreteness"] == [[0, 24, 0.66666667]]
    assert found["t2i_depictable_nouns"] == [[0, 24, 1]]
    assert found["t2i_clip_tokens"] == [[0, 24, 9]]
    assert compute_caption_signals("and so on", nouns, None)["t2i_concreteness"] == [[0, 9, None]]


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("a photo of a {lemma} in {{place}}", ["{lemma}", "{{place}}"]),
        ("${subject}, __color__ <concept> [NAME] %s %(who)s", None),
        ("a [red:0.5] fox (snow:1.2), 50% off, x < y > z, a_b_c", []),
    ],
)
def test_template_leakage(nouns: Nouns, text: str, leaks: list[str] | None) -> None:
    spans = compute_caption_signals(text, nouns, None)["t2i_template_leakage"]
    found = [text[start:end] for start, end, _ in spans]

    assert found == (text.replace(",", "").split() if leaks is None else leaks)


def test_repeated_tags_and_boosters(nouns: Nouns) -> None:
    text = "a fox, (masterpiece:1.2), Best Quality, 8k, 8k, best quality."
    found = compute_caption_signals(text, nouns, None)

    assert split_tags(text) == ["a fox", "masterpiece", "best quality", "8k", "8k", "best quality"]
    assert found["t2i_frac_repeated_tags"][0][2] == 0.33333333
    assert found["t2i_frac_booster_tags"][0][2] == 0.83333333


def test_tokens_are_the_pipelines_own() -> None:
    from transformers import CLIPTokenizer

    whole = CLIPTokenizer.from_pretrained(files("t2iprobe") / "assets" / "embedded_model" / "tokenizer")
    text = "An image of a red fox, 8k, the cat's café"

    assert load_token_counter("embedded").encode(text).ids == whole(text)["input_ids"]


def test_no_tokenizer() -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json in nowhere"):
        load_token_counter("nowhere")

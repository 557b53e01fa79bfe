"""The packaged WordNet 3.0 is whole, versioned, and answers by name, wnid and lemma without a download."""

import socket

import pytest

from t2iprobe import wordnet
from t2iprobe.errors import UserError, suggest


def test_packaged_database_is_the_versioned_one():
    assert wordnet.content_hash() == wordnet.WORDNET_HASH
    assert wordnet.reader().get_version() == "3.0"


def test_every_noun_synset_is_there():
    # wnstats(7WN) of WordNet 3.0: 82,115 noun synsets, 117,798 noun strings.
    assert sum(1 for _ in wordnet.reader().all_synsets("n")) == 82_115
    assert sum(1 for _ in wordnet.reader().all_lemma_names("n")) == 117_798


@pytest.mark.parametrize("name", ["dog.n.01", "n02084071", "dog", "domestic dog", "Dog.n.1", " dog "])
def test_synset_is_found_by_name_wnid_or_lemma(name):
    found = wordnet.synset(name)
    assert found.name() == "dog.n.01"
    assert wordnet.wnid(found) == "n02084071"
    assert found.lexname() == "noun.animal"
    assert found.definition().startswith("a member of the genus Canis")


def test_wnid_of_a_class_is_its_wordnet_offset():
    assert wordnet.synset("n01440764").name() == "tench.n.01"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("camell", "did you mean camel"),
        ("camell.n.01", "did you mean camel.n.01"),
        ("dog.n.99", "dog has dog.n.01, frump.n.01"),
        ("dog.n.00", "dog has dog.n.01"),
        ("n02084072", "eight digits"),
        ("", "no synset ''"),
        ("zzqqxx", "no synset 'zzqqxx'"),
    ],
)
def test_unknown_name_is_one_line_with_near_names(name, hint, recwarn):
    with pytest.raises(UserError) as error:
        wordnet.synset(name)
    assert hint in str(error.value)
    assert "\n" not in str(error.value)
    assert not recwarn.list


def test_nothing_is_downloaded(monkeypatch):
    import nltk

    def refuse(*_, **__):
        raise AssertionError("WordNet asked for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(nltk.data, "path", [])
    wordnet.reader.cache_clear()
    assert wordnet.synset("camel").lemma_names() == ["camel"]
    below = {synset.name() for synset in wordnet.synset("camel").hyponyms()}  # nltk keeps no order
    assert below == {"arabian_camel.n.01", "bactrian_camel.n.01"}


def test_suggest_lists_near_names_only():
    assert suggest("cmel", ["camel", "oven"]) == ", did you mean camel?"
    assert suggest("xyz", ["camel", "oven"]) == ""


def test_files_read_at_once_say_what_nltk_says() -> None:
    glosses = wordnet.noun_glosses()
    assert len(glosses) == 82115
    for name in ("dog.n.01", "teapot.n.01", "entity.n.01"):
        synset = wordnet.synset(name)
        assert (synset.lexname(), synset.definition()) in glosses
    counted = {(each.lemma, each.pos, each.sense): each.count for each in wordnet.tagged_senses()}
    for word, sense in (("dog", 1), ("run", 1), ("bank", 2)):
        lemma = next(
            one for one in wordnet.reader().synsets(word, "n")[sense - 1].lemmas() if one.name() == word
        )
        assert counted.get((word, "n", sense), 0) == lemma.count()

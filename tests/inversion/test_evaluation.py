import json

import numpy as np
import pytest

from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.inversion.evaluation import (
    COMPANIONS,
    choose_prompts,
    evaluate,
    find_companion,
    remove_token,
)
from t2iprobe.inversion.features import ClassifierFeatures, load_features, normalise

TOKEN = "<it>"
TRAIN = [f"a photo of a {TOKEN}", f"a rendering of a {TOKEN}"]


class ColourFeatures:
    """The mean colour of a picture; a text is the colour that it names."""

    name = "colours"

    def pictures(self, pictures):
        return normalise(np.array([picture.reshape(-1, 3).mean(axis=0) for picture in pictures]))

    def texts(self, texts):
        return normalise(np.array([[("red" in t), ("green" in t), ("blue" in t)] for t in texts], float))


def paint(colour, side=8):
    return np.broadcast_to(np.array(colour, np.uint8), (side, side, 3)).copy()


def make_draw(colour, spread=20):
    """Draw pictures of one colour with noise that depends on prompt and seed alone."""

    def draw(prompts, seeds):
        noise = [
            np.random.default_rng([seed % 2**32, len(p)]) for p, seed in zip(prompts, seeds, strict=True)
        ]
        return [paint(np.clip(np.array(colour) + rng.normal(0, spread, 3), 0, 255)) for rng in noise]

    return draw


RED, BLUE = [200, 30, 30], [30, 30, 200]


def test_a_taught_token_is_likelier_than_before_and_the_numbers_are_means_of_cosines():
    own = [paint(RED), paint([180, 60, 30])]
    found = evaluate(
        make_draw(RED), own, token=TOKEN, features=ColourFeatures(), prompts_train=TRAIN,
        prompts_new=[f"a red {TOKEN}"], draw_before=make_draw(BLUE), samples=6,
    )  # fmt: skip

    likeness = found["likeness"]
    features = ColourFeatures()
    from t2iprobe.inversion.evaluation import plan_pictures

    drawn = features.pictures(make_draw(RED)(*plan_pictures(TRAIN, 6, 0)))
    assert likeness["value"] == pytest.approx((drawn @ features.pictures(own).T).mean(), abs=1e-6)
    assert likeness["interval"][0] < likeness["value"] < likeness["interval"][1]
    assert likeness["before"]["value"] < 0.6 < likeness["value"]
    assert likeness["difference"]["value"] == pytest.approx(likeness["value"] - likeness["before"]["value"])
    assert likeness["difference"]["p"] < 0.01
    assert likeness["among_concept"] == pytest.approx(np.dot(*features.pictures(own)), abs=1e-6)
    distances = 1 - drawn @ drawn.T
    assert found["diversity"]["value"] == pytest.approx(distances[~np.eye(12, dtype=bool)].mean(), abs=1e-6)
    assert found["obedience"]["judge"] == "text"
    assert found["obedience"]["value"] > 0.9 > found["obedience"]["before"]["value"]
    json.dumps(found, allow_nan=False)


def test_the_same_pictures_before_and_after_do_not_differ():
    same = make_draw(RED)
    found = evaluate(
        same, [paint(RED)], token=TOKEN, features=ColourFeatures(), prompts_train=TRAIN,
        prompts_new=[f"a red {TOKEN}"], draw_before=same, samples=3,
    )  # fmt: skip

    for name in ("likeness", "obedience", "diversity"):
        assert found[name]["difference"] == {"value": 0, "interval": [0, 0], "p": 1}
    assert found["likeness"]["among_concept"] is None


def test_each_prompt_has_its_own_seeds_and_both_sides_the_same():
    asked = []

    def draw(prompts, seeds):
        asked.append((tuple(prompts), tuple(seeds)))
        return [paint(RED)] * len(prompts)

    evaluate(
        draw, [paint(RED)], token=TOKEN, features=ColourFeatures(), prompts_train=TRAIN,
        draw_before=draw, samples=4, seed=3,
    )  # fmt: skip

    after_train, after_new, before_train, before_new = asked
    assert (after_train, after_new) == (before_train, before_new)
    assert len(set(after_train[1] + after_new[1])) == 4 * (len(TRAIN) + len(COMPANIONS))
    assert after_train[0] == tuple(p for p in TRAIN for _ in range(4))
    assert after_new[0][0] == f"a bear and a {TOKEN}"


def test_one_picture_a_prompt_has_likeness_without_diversity_or_before():
    found = evaluate(
        make_draw(RED), [paint(RED)], token=TOKEN, features=ColourFeatures(), prompts_train=TRAIN[:1],
        samples=1,
    )  # fmt: skip

    assert found["diversity"] is None
    assert found["likeness"]["interval"] is None
    assert found["likeness"]["before"] is found["likeness"]["difference"] is None


def test_companions_are_the_classes_that_wordnet_has_below_them():
    hierarchy = Hierarchy.imagenet()
    synsets = {name: f"{name}.n.01" for name in COMPANIONS}

    for word, classes in COMPANIONS.items():
        assert list(classes) == np.flatnonzero(hierarchy.subtree(synsets[word])).tolist()


def test_without_texts_obedience_is_what_the_classifier_gives_the_companion():
    features = load_features("classifier", "cpu")
    assert isinstance(features, ClassifierFeatures)
    prompts = [f"a clock and a {TOKEN}", f"a {TOKEN} on the moon"]

    def see_clocks(pictures):
        logits = np.zeros((len(pictures), 1000), np.float32)
        logits[:, 409] = 20
        return logits

    features.classifier.score = see_clocks  # type: ignore[method-assign]
    found = evaluate(
        make_draw(RED), [paint(RED)], token=TOKEN, features=features, prompts_train=TRAIN[:1],
        prompts_new=prompts, samples=2,
    )  # fmt: skip
    nothing = evaluate(
        make_draw(RED), [paint(RED)], token=TOKEN, features=features, prompts_train=TRAIN[:1],
        prompts_new=prompts[1:], samples=2,
    )  # fmt: skip

    assert found["obedience"]["judge"] == "companion"
    assert found["obedience"]["value"] == pytest.approx(1, abs=1e-4)
    assert nothing["obedience"] is None


def test_texts_and_words_of_prompts():
    assert remove_token("a <it> in the snow", "<it>") == "a in the snow"
    assert find_companion("A Chair, and a <clock>", COMPANIONS) == "chair"
    assert find_companion("a chairman and birds", COMPANIONS) is None
    assert choose_prompts([f"{n} {{}}" for n in range(57)], "<a>", 3) == ["0 <a>", "19 <a>", "38 <a>"]
    assert choose_prompts(["a {}"], "<a>") == ["a <a>"]

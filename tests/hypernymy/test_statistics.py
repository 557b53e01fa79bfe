"""Intervals cover, unknown words are found at the promised rate, comparisons see what is there, no more."""

import json
import time

import numpy as np
import pytest

from t2iprobe.errors import UserError
from t2iprobe.hypernymy import Hierarchy, metrics, statistics
from t2iprobe.hypernymy.samples import reduce_logits


@pytest.fixture(scope="module")
def imagenet():
    return Hierarchy.imagenet()


@pytest.fixture(scope="module")
def animals(imagenet):
    """Thirty classes of five families, of which each stands above several synsets."""
    tops = ["terrier.n.01", "snake.n.01", "finch.n.01", "big_cat.n.01", "frog.n.01"]
    labels = [label for top in tops for label in np.flatnonzero(imagenet.subtree(top))[:6]]
    return Hierarchy.from_wnids([imagenet.wnids[label] for label in labels])


def draw(hierarchy, synsets, known, count, rng):
    """Logits of pictures: of a random class below a synset if it is known, of anything else if it is not."""
    logits = {}
    for name in synsets:
        inside = np.flatnonzero(hierarchy.subtree(name))
        everything = np.arange(len(hierarchy.classes))
        shown = rng.choice(inside if name in known else everything, count)
        logits[name] = rng.normal(0, 1, (count, len(everything)))
        logits[name][np.arange(count), shown] += rng.normal(5, 2, count)
    return logits


@pytest.fixture(scope="module")
def run(imagenet):
    """A run over all 860 synsets, of which the first 300 are known."""
    rng = np.random.default_rng(0)
    return draw(imagenet, imagenet.synsets, set(imagenet.synsets[:300]), 4, rng)


@pytest.fixture(scope="module")
def analysed(run, imagenet):
    return statistics.analyse(run, imagenet, resamples=300)


def test_values_are_those_of_the_metrics(run, analysed, imagenet):
    measured = metrics.measure(run, imagenet)
    rows = analysed["synsets"]
    assert [row["synset"] for row in rows] == measured.synsets
    for key in ("isp", "scs_raw", "subtree_entropy", "marginal_entropy"):
        values = np.array([np.nan if row[key] is None else row[key] for row in rows])
        assert values == pytest.approx(getattr(measured, key), abs=1e-9, nan_ok=True)
    scs = measured.scs_raw / metrics.SCS_NORMALISER
    results = analysed["results"]
    assert results["isp"]["value"] == pytest.approx(measured.isp.mean())
    assert results["scs"]["value"] == pytest.approx(np.nanmean(scs))
    assert results["scs"]["raw"] == pytest.approx(np.nanmean(measured.scs_raw))
    assert results["scs"]["samples"] == 4
    ratios = measured.scs_raw / np.log(np.maximum(measured.classes, 1.5))
    assert results["scs_mean_of_ratios"]["value"] == pytest.approx(np.nanmean(ratios))
    assert results["scs_isp_weighted"]["value"] == pytest.approx(np.nanmean(scs * measured.isp))
    assert results["subtree_entropy"]["value"] == pytest.approx(np.nanmean(measured.subtree_entropy))


def test_standard_error_is_that_of_a_stratified_mean(run, analysed, imagenet):
    variances = [
        metrics.in_subtree_probabilities(run[name], imagenet.subtree(name)).var(ddof=1) / 4
        for name in imagenet.synsets
    ]
    expected = np.sqrt(np.sum(variances)) / 860
    assert analysed["results"]["isp"]["stderr"] == pytest.approx(expected, rel=0.15)
    spread = np.std([row["isp"] for row in analysed["synsets"]], ddof=1) / np.sqrt(860)
    assert analysed["results"]["isp"]["stderr_synsets"] == pytest.approx(spread, rel=0.15)


def test_result_is_json_and_repeatable(run, analysed, imagenet):
    json.dumps(analysed, allow_nan=False)
    part = {name: run[name] for name in imagenet.synsets[::20]}
    first, again, other = (statistics.analyse(part, imagenet, resamples=100, seed=s) for s in (0, 0, 1))
    assert first == again
    assert other["results"]["isp"]["value"] == first["results"]["isp"]["value"]
    assert other["results"]["isp"]["interval"] != first["results"]["isp"]["interval"]


def test_uniform_baseline(analysed):
    uniform = analysed["uniform"]
    assert uniform["isp"] == pytest.approx(0.01343, abs=5e-6)
    assert uniform["scs"] == uniform["scs_corrected"] == 0
    assert uniform["marginal_entropy"] == pytest.approx(metrics.SCS_NORMALISER)


def test_coverage_counts(analysed):
    assert analysed["coverage"] == {
        "evaluated": "nonleaf",
        "synsets": 860,
        "of": 860,
        "samples_min": 4,
        "samples_max": 4,
    }


def test_a_full_run_is_analysed_in_seconds(imagenet):
    rng = np.random.default_rng(1)
    logits = {name: rng.normal(size=(32, 1000)).astype(np.float32) for name in imagenet.synsets}
    start = time.process_time()
    statistics.analyse(logits, imagenet)
    assert time.process_time() - start < 30


@pytest.mark.parametrize("count", [4, 12])
def test_intervals_of_the_headline_cover(animals, count):
    """ISP and corrected SCS cover the truth, SCS covers what it is on average at this number of pictures."""
    rng = np.random.default_rng(count)
    known = set(animals.synsets[::2])
    truth = statistics.summarise(
        reduce_logits(draw(animals, animals.synsets, known, 20_000, rng), animals), 2, rng
    )
    runs = [
        statistics.summarise(
            reduce_logits(draw(animals, animals.synsets, known, count, rng), animals), 200, rng
        )
        for _ in range(200)
    ]
    expected_scs = np.mean([run["scs"]["value"] for run in runs])
    targets = {
        "isp": truth["isp"]["value"],
        "scs": expected_scs,
        "subtree_entropy": truth["subtree_entropy"]["value"],
    }
    for metric, target in targets.items():
        inside = np.mean([run[metric]["interval"][0] <= target <= run[metric]["interval"][1] for run in runs])
        assert 0.88 <= inside <= 0.99, metric
    corrected = np.mean([run["scs_corrected"]["value"] for run in runs])
    bias, corrected_bias = expected_scs - truth["scs"]["value"], corrected - truth["scs"]["value"]
    assert bias < -0.02
    assert abs(corrected_bias) < 0.5 * abs(bias)


def test_corrected_scs_covers_the_truth_with_enough_pictures(animals):
    rng = np.random.default_rng(3)
    known = set(animals.synsets[::2])
    truth = statistics.summarise(
        reduce_logits(draw(animals, animals.synsets, known, 20_000, rng), animals), 2, rng
    )["scs"]["value"]
    covered = plug_in_covered = 0
    for _ in range(100):
        logits = draw(animals, animals.synsets, known, 32, rng)
        results = statistics.summarise(reduce_logits(logits, animals), 200, rng)
        low, high = results["scs_corrected"]["interval"]
        covered += low <= truth <= high
        low, high = results["scs"]["interval"]
        plug_in_covered += low <= truth <= high
    assert covered >= 85
    assert plug_in_covered < covered


def test_standard_errors_of_one_synset_are_the_spread_over_runs(imagenet):
    rng = np.random.default_rng(12)
    rows = [
        statistics.analyse(draw(imagenet, ["dog.n.01"], {"dog.n.01"}, 16, rng), imagenet, resamples=2)[
            "synsets"
        ][0]
        for _ in range(150)
    ]
    for metric in ("isp", "scs", "subtree_entropy", "marginal_entropy"):
        spread = np.std([row[metric] for row in rows], ddof=1)
        stated = np.sqrt(np.mean([row[f"{metric}_stderr"] ** 2 for row in rows]))
        assert stated == pytest.approx(spread, rel=0.25), metric


def test_unknown_words_of_a_run(analysed, imagenet):
    """At a false-discovery rate of 5 %, at most one known word in ten is not; most known ones are found."""
    everything = {"entity.n.01"}
    known = {row["synset"] for row in analysed["synsets"] if row["known"]} - everything
    truth = set(imagenet.synsets[:300])
    assert len(known - truth) <= 0.1 * len(known)
    assert len(known & truth) >= 0.9 * len(truth)
    assert analysed["unknown_test"]["rank"] > 850
    entity = next(row for row in analysed["synsets"] if row["synset"] == "entity.n.01")
    assert entity["known"]
    assert (entity["p"], entity["test"], entity["isp_interval"]) == (None, "none", [1, 1])


def test_similar_pictures_of_an_unknown_word_do_not_make_it_known(imagenet):
    """Each prompt draws one thing again and again: pictures are no independent witnesses, prompts are."""
    rng = np.random.default_rng(4)
    logits = {}
    for name in imagenet.synsets:
        logits[name] = np.repeat(rng.normal(0, 3, (1, 1000)), 16, axis=0) + rng.normal(0, 0.1, (16, 1000))
    rows = statistics.find_unknown(reduce_logits(logits, imagenet))
    assert rows["known"].sum() <= 5


def test_few_prompts_fall_back_to_the_floor(imagenet):
    rng = np.random.default_rng(5)
    names = ["dog.n.01", "boat.n.01", "camel.n.01", "bridge.n.01"]
    result = statistics.analyse(draw(imagenet, names, set(names[:2]), 16, rng), imagenet)
    assert {row["test"] for row in result["synsets"]} == {"t"}
    assert {row["synset"] for row in result["synsets"] if row["known"]} == set(names[:2])
    dog = next(row for row in result["synsets"] if row["synset"] == "dog.n.01")
    assert dog["floor"] == imagenet.subtree("dog.n.01").mean()
    assert result["coverage"]["synsets"] == 4


def test_what_the_classifier_saw(imagenet):
    logits = np.zeros((3, 1000))
    logits[:, 354] = 9  # Arabian camel
    row = statistics.analyse({"dog.n.01": logits}, imagenet)["synsets"][0]
    assert row["saw"][0] == ["Arabian camel", pytest.approx(0.890, abs=1e-3)]
    assert len(row["saw"]) == 5


def test_leaves_do_not_enter_the_headline(imagenet, run):
    with_leaves = dict(run) | {"tench.n.01": np.zeros((4, 1000)), "goldfish.n.01": np.zeros((4, 1000))}
    result = statistics.analyse(with_leaves, imagenet, resamples=10)
    alone = statistics.analyse(run, imagenet, resamples=10)
    assert result["results"]["isp"]["value"] == pytest.approx(alone["results"]["isp"]["value"])
    assert result["coverage"]["synsets"] == 860
    assert result["results_leaves"]["isp"]["value"] == pytest.approx(0.001)
    leaves = statistics.analyse({"tench.n.01": np.zeros((4, 1000))}, imagenet)
    assert leaves["coverage"]["evaluated"] == "leaves"
    assert leaves["results"]["isp"]["value"] == pytest.approx(0.001)
    assert leaves["results"]["scs"]["value"] is None


def test_one_picture_gives_values_without_errors(imagenet):
    rng = np.random.default_rng(6)
    result = statistics.analyse(draw(imagenet, ["dog.n.01", "boat.n.01"], set(), 1, rng), imagenet)
    json.dumps(result, allow_nan=False)
    assert result["results"]["isp"]["value"] > 0
    assert result["results"]["isp"]["stderr"] is None
    assert result["results"]["scs"]["value"] == 0
    assert result["results"]["scs"]["corrected"] is None
    assert "one picture" in result["warnings"][0]


def test_two_pictures_leave_the_error_of_scs_unknown(imagenet):
    """Their pseudo-values of SCS are one number twice: no spread, and no sign of a small error."""
    rng = np.random.default_rng(8)
    names = ["dog.n.01", "boat.n.01", "bird.n.01"]
    a, b = draw(imagenet, names, set(names), 2, rng), draw(imagenet, names, set(), 2, rng)
    result = statistics.analyse(a, imagenet)
    json.dumps(result, allow_nan=False)
    for metric in ("scs", "scs_corrected", "scs_mean_of_ratios", "scs_isp_weighted", "marginal_entropy"):
        assert result["results"][metric]["value"] > 0
        assert result["results"][metric]["stderr"] is None
        assert result["results"][metric]["interval"] is None
    assert result["results"]["isp"]["stderr"] > 0
    assert result["results"]["subtree_entropy"]["stderr"] > 0
    assert result["synsets"][0]["scs_stderr"] is None
    assert "two pictures" in result["warnings"][0]
    compared = statistics.compare(a, b, imagenet, same_pictures=True)
    assert compared["results"]["scs"]["p_pictures"] is None
    assert compared["results"]["scs"]["p"] is not None
    assert compared["results"]["isp"]["p_pictures"] < 1
    three = statistics.analyse(draw(imagenet, names, set(names), 3, rng), imagenet)
    assert three["results"]["scs"]["stderr"] > 0
    assert three["warnings"] == []


def test_mixed_numbers_of_pictures_are_warned_about(imagenet):
    rng = np.random.default_rng(7)
    logits = draw(imagenet, ["dog.n.01"], set(), 4, rng) | draw(imagenet, ["boat.n.01"], set(), 8, rng)
    result = statistics.analyse(logits, imagenet)
    assert "from 4 to 8 pictures" in result["warnings"][0]
    assert result["results"]["scs"]["samples"] == 4


def test_nothing_to_analyse(imagenet):
    with pytest.raises(UserError, match="no logits"):
        statistics.analyse({}, imagenet)


def test_comparison_finds_what_one_run_knows_and_the_other_does_not(imagenet):
    rng = np.random.default_rng(8)
    few = draw(imagenet, imagenet.synsets, set(imagenet.synsets[:300]), 8, rng)
    more = draw(imagenet, imagenet.synsets, set(imagenet.synsets[:500]), 8, rng)
    result = statistics.compare(few, more, imagenet, resamples=200)
    json.dumps(result, allow_nan=False)
    isp = result["results"]["isp"]
    assert isp["difference"] == pytest.approx(isp["b"] - isp["a"])
    assert 0 < isp["interval"][0] < isp["difference"] < isp["interval"][1]
    assert isp["p"] < 0.001
    assert isp["p_pictures"] < 0.001
    learnt = set(imagenet.synsets[300:500])
    assert len(set(result["only_b"]) & learnt) > 150
    assert len(set(result["only_b"]) - learnt) < 40
    assert len(result["only_a"]) < 40
    significant = [row for row in result["synsets"] if row["q"] is not None and row["q"] <= 0.05]
    assert len(significant) > 50
    assert np.mean([row["synset"] in learnt for row in significant]) > 0.85


def test_comparison_of_equal_models_finds_nothing(imagenet):
    """Of 30 pairs of runs of one model, one in twenty may differ."""
    rng = np.random.default_rng(9)
    names = imagenet.synsets[::30]
    results = []
    for _ in range(30):
        a, b = (draw(imagenet, names, set(names[:15]), 4, rng) for _ in range(2))
        results.append(statistics.compare(a, b, imagenet, resamples=100)["results"]["isp"])
    assert sum(result["p"] <= 0.05 for result in results) <= 5
    assert sum(result["p_pictures"] <= 0.05 for result in results) <= 5
    assert sum(result["interval"][0] <= 0 <= result["interval"][1] for result in results) >= 25


def test_pairing_pictures_sees_smaller_differences(imagenet):
    rng = np.random.default_rng(10)
    names = imagenet.synsets[::20]
    a = draw(imagenet, names, set(names), 8, rng)
    b = {name: logits + rng.normal(0, 0.1, logits.shape) for name, logits in a.items()}
    paired = statistics.compare(a, b, imagenet, same_pictures=True)["results"]["isp"]
    unpaired = statistics.compare(a, b, imagenet)["results"]["isp"]
    assert paired["difference"] == unpaired["difference"]
    assert paired["stderr"] < 0.3 * unpaired["stderr"]


def test_comparison_uses_the_same_number_of_pictures(imagenet):
    rng = np.random.default_rng(11)
    names = ["dog.n.01", "boat.n.01"]
    a, b = draw(imagenet, names, set(names), 32, rng), draw(imagenet, names[:1], set(names), 4, rng)
    b["camel.n.01"] = b["dog.n.01"]
    result = statistics.compare(a, b, imagenet)
    assert result["coverage"]["missing_b"] == ["boat.n.01"]
    assert result["coverage"]["missing_a"] == ["camel.n.01"]
    assert result["synsets"][0]["samples"] == 4
    assert "as many as both have" in result["warnings"][0]
    assert result["results"]["scs"]["a"] == pytest.approx(
        metrics.subtree_coverage_score(a["dog.n.01"][:4], imagenet.subtree("dog.n.01"))
        / metrics.SCS_NORMALISER
    )
    identical = statistics.compare(a, a, imagenet, same_pictures=True)["results"]["isp"]
    assert (identical["difference"], identical["p"]) == (0, 1)


def test_runs_without_a_common_synset(imagenet):
    zero = np.zeros((2, 1000))
    with pytest.raises(UserError, match="no synset in common"):
        statistics.compare({"dog.n.01": zero}, {"boat.n.01": zero}, imagenet)

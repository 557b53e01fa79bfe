"""Runs under several templates: common noise, the mean of embeddings, and what is made of their logits."""

import json

import numpy as np
import pytest
import torch
from page_checks import check_page
from report_example import make_manifest
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.config import load_study
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.prompts import MEAN
from t2iprobe.hypernymy.sampling import DiffusersSampler
from t2iprobe.hypernymy.study import make_manifest as plan
from t2iprobe.hypernymy.templates import analyse_templates, measure_templates
from t2iprobe.pipelines import place_pipeline
from t2iprobe.plans import build_plan
from t2iprobe.runs import PlanEntry, Run
from t2iprobe.testing import tiny_pipeline

SYNSETS = ("dog.n.01", "bird.n.01", "vehicle.n.01", "fruit.n.01")


def test_common_seeds_depend_on_no_template():
    prompts = {name: {"base": f"An image of {name}.", "empty": name} for name in SYNSETS}
    common = build_plan([{"samples": 2, "prompts": prompts, "common_seeds": True}], 7)
    own = build_plan([{"samples": 2, "prompts": prompts}], 7)
    assert [(e.synset, e.template, e.index) for e in common] == [(e.synset, e.template, e.index) for e in own]
    seeds = {}
    for entry in common:
        seeds.setdefault((entry.synset, entry.index), set()).add(entry.seed)
    assert {len(each) for each in seeds.values()} == {1}
    assert len(set.union(*seeds.values())) == len(SYNSETS) * 2
    assert len({entry.seed for entry in own}) == len(own)


def test_the_preset_draws_twelve_templates_and_their_mean():
    study = load_study("templates", {"synsets": "dog.n.01"})
    manifest = plan(study)
    by_template = manifest["plan"][0]["prompts"]["dog.n.01"]
    assert len(by_template) == 13
    assert by_template[MEAN].splitlines() == [by_template[name] for name in study.templates]
    assert manifest["identity"]["common_seeds"]
    assert manifest["plan"][0]["common_seeds"]
    assert "common_seeds" not in plan(load_study(None, {"synsets": "dog.n.01"}))["identity"]


def test_a_prompt_of_lines_is_drawn_from_the_mean_of_their_embeddings():
    pipeline = tiny_pipeline("sd")
    place_pipeline(pipeline, "cpu", "float32")
    settings = {"steps": 2, "guidance": 3.0}
    sampler = DiffusersSampler(pipeline, average_lines=True, **settings)

    def draw(sampler, prompt):
        return sampler.sample([PlanEntry("dog.n.01", "t", 0, prompt, 11)])[0]

    one, other = "a dog", "a very large owl"
    embeddings = sampler.encoder.encode([one, other, f"{one}\n{other}"])["prompt_embeds"]
    torch.testing.assert_close(embeddings[2], (embeddings[0] + embeddings[1]) / 2)
    plain = DiffusersSampler(pipeline, **settings)
    np.testing.assert_array_equal(draw(sampler, one), draw(plain, one))
    np.testing.assert_array_equal(draw(sampler, f"{one}\n{one}"), draw(plain, one))
    assert (draw(sampler, f"{one}\n{other}") != draw(plain, f"{one}\n{other}")).any()


def test_families_without_a_mean_are_refused():
    pipeline = tiny_pipeline("flux")
    with pytest.raises(UserError, match="have no mean"):
        DiffusersSampler(pipeline, average_lines=True)


def test_measures_by_hand():
    # Two synsets over four classes; two pictures of the first, as many of the second.
    subtrees = np.array([[True, True, False, False], [False, False, False, True]])
    probabilities = np.array(
        [
            [[0.6, 0.2, 0.1, 0.1], [0.1, 0.3, 0.5, 0.1]],
            [[0.2, 0.2, 0.2, 0.4], [0.7, 0.1, 0.1, 0.1]],
        ]
    )
    found = measure_templates(probabilities, subtrees, normaliser=2.0)
    np.testing.assert_allclose(found["isp"], [(0.8 + 0.4) / 2, (0.4 + 0.1) / 2])
    np.testing.assert_allclose(found["hit"], [0.5, 0.5])
    q = np.array([[0.75, 0.25], [0.25, 0.75]])
    mean = q.mean(axis=0)
    np.testing.assert_allclose(found["scs"][0], (q * np.log(q / mean)).sum(axis=1).mean() / 2.0)
    assert np.isnan(found["scs"][1])


def make_run(path, templates=("base", "empty", "photo"), samples=2, seed=0, lift=(0.0, 2.0, 4.0), mean=True):
    """Logits that know more the higher the template's `lift` is; the mean of embeddings knows most."""
    manifest = make_manifest(list(SYNSETS), samples=samples, templates=list(templates))
    names = [*templates, *([MEAN] if mean else [])]
    manifest["plan"] = [
        {"samples": samples, "prompts": {s: {t: f"{t} of {s}" for t in names} for s in SYNSETS}}
    ]
    manifest["identity"]["keep"] = "none"
    run = Run.create(path, manifest)
    rng, hierarchy = np.random.default_rng(seed), Hierarchy.imagenet()
    levels = dict(zip(names, (*lift, 6.0), strict=False))
    logits = rng.standard_normal((len(run.plan), 1000)).astype(np.float32)
    for row, entry in zip(logits, run.plan, strict=True):
        inside = np.flatnonzero(hierarchy.subtree(entry.synset))
        row[rng.choice(inside)] += 3.0 + levels[entry.template]
    run.write_shard(range(len(run.plan)), {"embedded": logits})
    return run


def test_a_run_is_analysed_by_template(tmp_path):
    run = make_run(tmp_path / "run")
    (found,) = analyse_templates([run])["runs"]
    isp = {row["template"]: row["isp"]["value"] for row in found["templates"]}
    assert list(isp) == ["base", "empty", "photo", MEAN]
    assert isp["base"] < isp["empty"] < isp["photo"] < isp[MEAN]
    by_template = run.logits_by_template()
    whole = np.concatenate([by_template["empty"][name] for name in SYNSETS])
    soft = np.exp(whole) / np.exp(whole).sum(axis=1, keepdims=True)
    subtrees = np.repeat([Hierarchy.imagenet().subtree(name) for name in SYNSETS], 2, axis=0)
    assert isp["empty"] == pytest.approx((soft * subtrees).sum(axis=1).mean(), rel=1e-5)
    singles = [isp[name] for name in ("base", "empty", "photo")]
    assert found["spread"]["isp"]["mean"] == pytest.approx(np.mean(singles))
    assert found["spread"]["isp"]["range"] == pytest.approx(max(singles) - min(singles))
    # ISP is linear: an ensemble of pictures has the mean of its templates' ISPs, and no spread when all join.
    sizes = found["ensembles"]
    assert [row["isp"]["subsets"] for row in sizes] == [3, 3, 1]
    for row in sizes:
        assert row["isp"]["mean"] == pytest.approx(np.mean(singles), rel=1e-5)
    assert sizes[0]["isp"]["sd"] > sizes[1]["isp"]["sd"] > sizes[2]["isp"]["sd"] == 0
    mean = found["conditioning"]["isp"]
    assert mean["against_mean"]["value"] == pytest.approx(isp[MEAN] - np.mean(singles))
    assert mean["best"] == "photo"
    assert found["ranking"]["synsets"]["spearman"] == 1.0


def test_ranks_are_compared_between_runs(tmp_path):
    same = [make_run(tmp_path / f"a{n}", seed=n, mean=False) for n in range(2)]
    assert analyse_templates(same)["ranks"]["templates_between_runs"]["spearman"] == 1.0
    turned = make_run(tmp_path / "b", lift=(4.0, 2.0, 0.0), mean=False)
    assert analyse_templates([same[0], turned])["ranks"]["templates_between_runs"]["spearman"] == -1.0
    other = make_run(tmp_path / "c", templates=("base", "photo"), lift=(0.0, 1.0), mean=False)
    with pytest.raises(UserError, match="has other templates"):
        analyse_templates([same[0], other])
    single = make_run(tmp_path / "d", templates=("base",), lift=(0.0,), mean=False)
    with pytest.raises(UserError, match="has a single template"):
        analyse_templates([single])


def test_one_picture_has_no_coverage(tmp_path):
    (found,) = analyse_templates([make_run(tmp_path / "run", samples=1)])["runs"]
    assert found["mixed"] is None
    assert "scs" not in found["spread"]
    assert "scs" not in found["templates"][0]


def test_the_command_writes_page_and_json(tmp_path):
    run = make_run(tmp_path / "run")
    result = CliRunner().invoke(app, ["hypernymy", "templates", str(run.path), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((run.path / "templates.json").read_text())
    check_page((run.path / "templates.html").read_text())
    several = make_run(tmp_path / "other", seed=5)
    page = tmp_path / "both.html"
    CliRunner().invoke(
        app, ["hypernymy", "templates", str(run.path), str(several.path), "--out", str(page)],
        catch_exceptions=False,
    )  # fmt: skip
    check_page(page.read_text())

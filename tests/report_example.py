"""Runs with real analyses of made-up logits and pictures, for the tests of the pages."""

import io

import numpy as np
from PIL import Image

from t2iprobe.config import dump_study, load_study
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.prompts import render
from t2iprobe.hypernymy.report_page import render as render_report
from t2iprobe.hypernymy.statistics import analyse
from t2iprobe.runs import SCHEMA, Run, build_plan
from t2iprobe.wordnet import synset

CLASSES = 1000


def make_manifest(synsets, samples=4, model="embedded", classifiers=("embedded",), seed=0, **settings):
    given = {
        "model": model,
        "classifiers": list(classifiers),
        "synsets": ",".join(synsets) if len(synsets) < 10 else "nonleaf",
        "samples": samples,
        "seed": seed,
        **settings,
    }
    configuration = dump_study(load_study(None, given))
    identity = {
        "model": "sha256:" + "0" * 64,
        "classifiers": {name: {"hash": "sha256:" + "1" * 64, "dtype": "float32"} for name in classifiers},
        "hierarchy": Hierarchy.imagenet().content_hash(),
        "keep": "thumbnails",
        "samples": samples,
        "synsets": list(synsets),
        "scheduler": {"_class_name": "DDIMScheduler", "beta_end": 0.012},
        **{key: configuration[key] for key in ("steps", "guidance", "seed", "templates")},
    }
    prompts = {name: {"base": render("base", synset(name))} for name in synsets}
    return {
        "schema": SCHEMA,
        "configuration": configuration,
        "identity": identity,
        "versions": {"t2iprobe": "0.1.0", "torch": "2.14.1"},
        "created": "2026-11-23T12:00:00+00:00",
        "plan": [{"samples": samples, "prompts": prompts}],
    }


def make_logits(plan, seed, skill=0.6):
    """[n, C]: for a share `skill` of the synsets the pictures show classes of the subtree, else another."""
    rng = np.random.default_rng(seed)
    hierarchy = Hierarchy.imagenet()
    known, other = {}, {}
    logits = rng.standard_normal((len(plan), CLASSES)).astype(np.float32)
    for row, entry in zip(logits, plan, strict=True):
        name = entry.synset
        if name not in known:
            known[name], other[name] = rng.random() < skill, int(rng.integers(CLASSES))
        inside = np.flatnonzero(hierarchy.subtree(name))
        row[rng.choice(inside) if known[name] else other[name]] += rng.normal(8, 2)
    return logits


def make_pictures(count, seed, side=64):
    """uint8 [count, side, side, 3]: a disc on a shaded ground, in many colours."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    colours = rng.integers(0, 256, (count, 2, 3))
    centres = rng.uniform(0.3, 0.7, (count, 2))
    disc = (x[None] - centres[:, :1, None]) ** 2 + (y[None] - centres[:, 1:, None]) ** 2 < 0.07
    ground = (colours[:, None, None, 0] * (0.5 + 0.5 * y)[None, :, :, None]).astype(np.uint8)
    return np.where(disc[..., None], colours[:, None, None, 1], ground).astype(np.uint8)


def make_run(path, synsets=None, *, logits_seed=0, skill=0.6, pictures=True, **settings):
    """Write a complete run; all 860 synsets by default."""
    manifest = make_manifest(synsets or Hierarchy.imagenet().synsets, **settings)
    if not pictures:
        manifest["identity"]["keep"] = "none"
    run = Run.create(path, manifest)
    logits = {name: make_logits(run.plan, logits_seed + i, skill) for i, name in enumerate(run.classifiers)}
    run.write_shard(range(len(run.plan)), logits, make_pictures(len(run.plan), logits_seed))
    return run


def make_results(synsets=None, *, seeds=(0,), skill=0.6, **settings):
    """results.json of a made-up run, without a directory; one classifier a seed. Returns (results, plan)."""
    classifiers = ["embedded", "timm:other"][: len(seeds)]
    manifest = make_manifest(synsets or Hierarchy.imagenet().synsets, classifiers=classifiers, **settings)
    plan = build_plan(manifest["plan"], 0)
    analyses = {}
    for name, seed in zip(classifiers, seeds, strict=True):
        logits: dict[str, list] = {}
        for entry, row in zip(plan, make_logits(plan, seed, skill), strict=True):
            logits.setdefault(entry.synset, []).append(row)
        stacked = {synset: np.stack(rows) for synset, rows in logits.items()}
        analyses[name] = analyse(stacked, Hierarchy.imagenet(), resamples=200)
    parts = {key: manifest[key] for key in ("configuration", "identity", "versions", "created")}
    return {"schema": "t2iprobe.results/1", **analyses["embedded"], **parts, "classifiers": analyses}, plan


def encode_pictures(count=24):
    """Some pictures as PNG bytes."""
    encoded = []
    for picture in make_pictures(count, seed=3):
        target = io.BytesIO()
        Image.fromarray(picture).save(target, "PNG")
        encoded.append(target.getvalue())
    return encoded


def render_example(synsets=None, *, pictures=4, **settings):
    """A report page of made-up results. Returns (page, results)."""
    results, plan = make_results(synsets, **settings)
    pool = encode_pictures()
    names = [row["synset"] for row in results["synsets"]]
    chosen = {name: [pool[(i + k) % len(pool)] for k in range(pictures)] for i, name in enumerate(names)}
    entries: dict[str, list] = {}
    for entry in plan:
        entries.setdefault(entry.synset, []).append(entry)
    return render_report(results, chosen.__getitem__, entries=entries), results

"""A finished training and a finished teaching, made up, for the tests of their pages."""

import json

import numpy as np
from PIL import Image
from report_example import make_pictures

from t2iprobe.intervals import describe_difference, describe_mean, describe_probability, holm
from t2iprobe.inversion.settings import Training

TOKEN = "<harp>"
METHODS = ("textual-inversion", "dreambooth-lora", "custom-diffusion")
WORDS = ("harp.n.01", "pretzel.n.01", "soccer_ball.n.01", "tiger.n.02", "maraca.n.01")


def write_pictures(folder, prefix, count, seed):
    """Write made-up pictures; their names relative to `folder`."""
    names = [f"{prefix}{number}.png" for number in range(count)]
    for name, picture in zip(names, make_pictures(count, seed), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / name)
    return names


def make_curve(steps, every, seed=0, fall=0.02, jitter=0.0015):
    """A loss that decays to a flat tail with jitter, and its thirds."""
    rng = np.random.default_rng(seed)
    at = np.arange(0, steps + 1, every)
    decay = fall * (1 - np.exp(-at / 110))
    curve = 1 - decay + jitter * rng.standard_normal(len(at))
    curve[0] = 1
    bands = np.stack([level * (1 - share * decay) for level, share in ((0.6, 0.2), (0.14, 1.4), (0.02, 2))])
    bands *= 1 + jitter * rng.standard_normal(bands.shape)
    return at.tolist(), curve.tolist(), bands.T.tolist()


def make_measure(rng, before, after, count=32, **more):
    one, other = before + 0.06 * rng.standard_normal(count), after + 0.06 * rng.standard_normal(count)
    return {
        **describe_mean(other),
        "before": describe_mean(one),
        "difference": describe_difference(one, other),
        **more,
    }


def make_evaluation():
    rng = np.random.default_rng(1)
    return {
        "features": "EfficientNet-Lite0",
        "prompts_train": [f"a photo of a {TOKEN}", f"a rendering of the nice {TOKEN}"],
        "prompts_new": [f"a bear and a {TOKEN}", f"a chair and a {TOKEN}"],
        "samples": 8,
        "concept_pictures": 4,
        "seed": 0,
        "resampling": {"resamples": 2000, "level": 0.95},
        "likeness": make_measure(rng, 0.42, 0.63, among_concept=0.71),
        "obedience": make_measure(rng, 0.2, 0.17, judge="companion"),
        "diversity": make_measure(rng, 0.31, 0.24, among_concept=0.29),
    }


def make_training(folder, steps=410, every=10, evaluation=True, grids=(0, 50, 100, 200, 410), **changes):
    """Write a made-up finished training into `folder`; its training.json, as a dictionary."""
    folder.mkdir(parents=True, exist_ok=True)
    at, curve, bands = make_curve(steps, every)
    prompts = [f"a photo of a {TOKEN}"] * 2 + [f"a rendering of a {TOKEN}"] * 2
    rng = np.random.default_rng(2)
    training = {
        "schema": "t2iprobe.training/1",
        "token": TOKEN,
        "vectors": 1,
        "method": "textual-inversion",
        "model": "embedded",
        "model_hash": "sha256:" + "0" * 64,
        "settings": Training(seed=3, steps=8, guidance=3.0).model_dump(),
        "steps": steps,
        "stop": {
            "rule": "plateau",
            "step": steps,
            "value": 0.046,
            "reason": "flat: the next 21 checks would gain at most 4.6% of what was gained so far",
        },
        "curve": [list(pair) for pair in zip(at, curve, strict=True)],
        "bands": [[step, *row] for step, row in zip(at, bands, strict=True)],
        "statistic": [[step, None if step < 290 else 0.046 * (step / steps) ** -6] for step in at],
        "train_loss": [[step, 0.25 + 0.05 * rng.standard_normal()] for step in at[1:]],
        "seconds": 83.4,
        "seconds_grids": 9.1,
        "initial": {"how": "nearest", "words": ["violin"]},
        "pictures": [str(folder / name) for name in write_pictures(folder, "../concept/", 4, 5)],
        "files": ["learned_embeds.safetensors", "harp.safetensors"],
        "grids": [
            {
                "step": step,
                "prompts": prompts,
                "files": write_pictures(folder, f"grids/step_{step:06}/", len(prompts), step),
            }
            for step in grids
        ],
        "versions": {"t2iprobe": "0.1.0", "torch": "2.14.1"},
        "created": "2026-11-23T12:00:00+00:00",
        "evaluation": make_evaluation() if evaluation else None,
    } | changes
    (folder / "training.json").write_text(json.dumps(training), encoding="utf-8")
    return training


def make_teaching(folder, words=WORDS, methods=METHODS, samples=16, others=True, **changes):
    """Write a made-up finished teaching into `folder`; its results.json, as a dictionary."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    skill = dict(zip(METHODS, (0.06, 0.5, 0.3), strict=True))
    rows = []
    for method in methods:
        for number, word in enumerate(words):
            lemma = word.split(".")[0].replace("_", " ")
            before = rng.beta(0.02, 20, samples)
            fits = method != "textual-inversion" or number == 1
            after = rng.beta(6 * skill[method], 6, samples) if fits else rng.beta(0.03, 20, samples)
            place = f"{word}/{method}"
            rows.append(
                {
                    "word": lemma,
                    "synset": word,
                    "method": method,
                    "token": f"<{lemma.replace(' ', '-')}>",
                    "prompt_before": f"An image of a {lemma}.",
                    "prompt_after": f"An image of a <{lemma.replace(' ', '-')}>.",
                    "before": describe_probability(before),
                    "after": describe_probability(after),
                    "difference": describe_difference(before, after),
                    "steps": int(rng.integers(200, 600)),
                    "seconds": float(rng.uniform(20, 90)),
                    "stop": {"rule": "plateau", "step": 300, "value": 0.04, "reason": "flat"},
                    "pictures_before": write_pictures(folder, f"probe/{word}/before/", 4, number),
                    "pictures_after": write_pictures(folder, f"probe/{place}/", 4, 20 + len(rows)),
                    "concept_pictures": write_pictures(folder, f"concepts/{word}/", 3, 60 + number),
                }
            )
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        for row, q in zip(own, holm([row["difference"]["p"] for row in own]), strict=True):
            row["difference"]["q"] = q
            row["significant"] = q is not None and q < 0.05 and row["difference"]["value"] > 0
    drift = {
        method: None
        if method == "textual-inversion"
        else {
            "words": ["dog.n.01", "bird.n.01"],
            "before": describe_probability(before := rng.random(16)),
            "after": describe_probability(after := before + 0.05 * rng.standard_normal(16) - 0.01),
            "difference": describe_difference(before, after),
        }
        for method in methods
    }
    results = {
        "schema": "t2iprobe.teaching/1",
        "run": "runs/embedded",
        "model": "embedded",
        "classifier": "embedded",
        "samples": samples,
        "seed": 0,
        "alpha": 0.05,
        "methods": list(methods),
        "words": rows,
        "others": drift if others else dict.fromkeys(methods),
        "settings": Training(steps=8, guidance=3.0, row_rate=0.02).model_dump(),
        "seconds": 641.0,
    } | changes
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return results

"""Did the concept take? Likeness to its pictures, obedience to new prompts, diversity; before and after."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from t2iprobe.intervals import LEVEL, RESAMPLES, describe_difference, describe_mean, jackknife_pairs
from t2iprobe.inversion.features import ClassifierFeatures, Features, load_features
from t2iprobe.plans import picture_seed

if TYPE_CHECKING:
    from t2iprobe.inversion.concepts import Concept
    from t2iprobe.inversion.training import Training

#: (prompts, seeds) → a picture uint8 [H, W, 3] each.
Draw = Callable[[Sequence[str], Sequence[int]], list[np.ndarray]]

#: Words of new prompts that models tend to know, with their classes among ImageNet's 1000.
COMPANIONS: dict[str, tuple[int, ...]] = {
    "bear": (*range(294, 298),),
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "chair": (423, 559, 765, 857),
    "clock": (409, 530, 892),
    "fish": (*range(7), *range(389, 398)),
}
TRAIN_PROMPTS = 4


@dataclass(frozen=True)
class Measured:
    """What the drawn pictures of one model say, one value a picture; obedience None where nothing can say."""

    likeness: np.ndarray
    obedience: np.ndarray | None
    diversity: np.ndarray


def evaluate(
    draw: Draw,
    concept_pictures: Sequence[np.ndarray],
    *,
    token: str,
    features: Features,
    prompts_train: Sequence[str],
    prompts_new: Sequence[str] | None = None,
    companions: Mapping[str, Sequence[int]] = COMPANIONS,
    draw_before: Draw | None = None,
    samples: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a taught token, ready for JSON; with `draw_before` also what the model drew before training.

    - Likeness: mean cosine of the pictures drawn for `prompts_train` with the concept's pictures.
    - Obedience: of the pictures drawn for `prompts_new`. With CLIP, the mean cosine with their prompt, the
      token left out of it (arXiv 2302.04841). Otherwise the mean probability that the packaged
      classifier gives to the companion in the prompt: the chair of "a chair and a <token>". That asks whether
      the rest of the prompt is still drawn, in terms of 1000 classes, and not whether the picture is as the
      prompt says; it compares with what the same model did before, not with another's.
    - Diversity: mean of 1 − cosine over all pairs of pictures drawn for `prompts_train`.

    Each is {value, interval, before, difference}: 95 % bootstrap intervals over the drawn pictures, `before`
    {value, interval} and `difference` {value, interval, p} (after − before, paired by prompt and seed), both
    None without `draw_before`. `among_concept` is what likeness and diversity are among the concept's own
    pictures, None for a single one.

    Args:
        draw: draws pictures with the taught token; the same seed twice must give the same picture.
        concept_pictures: uint8 [H, W, 3] each.
        token: as it stands in the prompts.
        features: see `load_features`.
        prompts_train: prompts like those of the training, with the token.
        prompts_new: prompts unlike them, with the token; by default "a COMPANION and a TOKEN".
        companions: word → its classes among the classifier's.
        draw_before: draws with the token as it was before training.
        samples: pictures a prompt, each with its own seed.
        seed: of the pictures.
    """
    new = list(prompts_new or [f"a {word} and a {token}" for word in companions])
    own = features.pictures(concept_pictures)
    plans = [plan_pictures(prompts, samples, seed) for prompts in (list(prompts_train), new)]
    after, before = (
        measure(each, plans, own, token, features, companions) if each else None
        for each in (draw, draw_before)
    )
    assert after is not None
    spread = mean_distance(own)
    more: dict[str, dict[str, Any]] = {
        "likeness": {"among_concept": None if spread is None else 1 - spread},
        "obedience": {"judge": "companion" if features.texts(new[:1]) is None else "text"},
        "diversity": {"among_concept": spread},
    }
    found = {
        name: compare_measured(getattr(after, name), getattr(before, name, None), seed, **more[name])
        for name in more
    }
    return {
        "features": features.name,
        "prompts_train": list(prompts_train),
        "prompts_new": new,
        "samples": samples,
        "concept_pictures": len(own),
        "seed": seed,
        "resampling": {"resamples": RESAMPLES, "level": LEVEL},
        **found,
    }


def evaluate_learner(
    draw: Draw, draw_before: Draw, concept: "Concept", settings: "Training", device: str, dtype: str
) -> dict[str, Any]:
    """Evaluate what a training taught, by its settings (see `evaluate`)."""
    return evaluate(
        draw,
        list(concept.pictures.permute(0, 2, 3, 1).numpy()),
        token=concept.token,
        features=load_features(settings.features, device, dtype),
        prompts_train=choose_prompts(concept.templates, concept.token),
        draw_before=draw_before,
        samples=settings.evaluate,
        seed=settings.seed,
    )


def choose_prompts(templates: Sequence[str], token: str, count: int = TRAIN_PROMPTS) -> list[str]:
    """Return up to `count` of the templates, evenly spread, with the token in them."""
    places = np.linspace(0, len(templates), min(count, len(templates)), endpoint=False).astype(int)
    return [templates[place].replace("{}", token) for place in places]


def plan_pictures(prompts: Sequence[str], samples: int, seed: int) -> tuple[list[str], list[int]]:
    """Return a prompt and a seed for each picture, `samples` for every prompt."""
    drawn = [
        (prompt, picture_seed(seed, prompt, "", index)) for prompt in prompts for index in range(samples)
    ]
    return [prompt for prompt, _ in drawn], [number for _, number in drawn]


def measure(
    draw: Draw,
    plans: Sequence[tuple[list[str], list[int]]],
    own: np.ndarray,
    token: str,
    features: Features,
    companions: Mapping[str, Sequence[int]],
) -> Measured:
    """Draw the pictures of the two plans (training prompts, new ones) and measure each."""
    (prompts, seeds), (new_prompts, new_seeds) = plans
    drawn = features.pictures(draw(prompts, seeds))
    return Measured(
        likeness=drawn @ own.mean(axis=0),
        obedience=judge_obedience(draw(new_prompts, new_seeds), new_prompts, token, features, companions),
        diversity=jackknife_pairs(1 - (drawn @ drawn.T).astype(np.float64)),
    )


def judge_obedience(
    pictures: Sequence[np.ndarray],
    prompts: Sequence[str],
    token: str,
    features: Features,
    companions: Mapping[str, Sequence[int]],
) -> np.ndarray | None:
    """[n] how well each picture fits its prompt: see `evaluate`. None where no prompt names a companion."""
    texts = features.texts([remove_token(prompt, token) for prompt in prompts])
    if texts is not None:
        return (features.pictures(pictures) * texts).sum(axis=1)
    found = [
        (row, word) for row, prompt in enumerate(prompts) if (word := find_companion(prompt, companions))
    ]
    if not found or not isinstance(features, ClassifierFeatures):
        return None
    given = features.probabilities([pictures[row] for row, _ in found])
    return np.array([given[i, list(companions[word])].sum() for i, (_, word) in enumerate(found)])


def remove_token(prompt: str, token: str) -> str:
    """Return a prompt without its token."""
    return " ".join(prompt.replace(token, " ").split())


def find_companion(prompt: str, companions: Mapping[str, Sequence[int]]) -> str | None:
    """Return the first companion that a prompt names, None where it names none."""
    words = re.findall(r"\w+", prompt.lower())
    return next((word for word in words if word in companions), None)


def mean_distance(vectors: np.ndarray) -> float | None:
    """Return the mean of 1 − cosine over all pairs of unit vectors [n, d], None for one."""
    count = len(vectors)
    distances = 1 - (vectors @ vectors.T).astype(np.float64)
    return float(distances[~np.eye(count, dtype=bool)].mean()) if count > 1 else None


def compare_measured(
    after: np.ndarray | None, before: np.ndarray | None, seed: int, **more: Any
) -> dict[str, Any] | None:
    """Return {value, interval, before, difference, **more} of values [n] of pictures that are pairs."""
    if after is None or np.isnan(after).any():
        return None
    return {
        **describe_mean(after, seed),
        "before": None if before is None else describe_mean(before, seed),
        "difference": None if before is None else describe_difference(before, after, seed),
        **more,
    }

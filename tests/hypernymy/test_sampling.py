import numpy as np
import pytest
import torch

from t2iprobe.errors import UserError
from t2iprobe.hypernymy.sampling import DiffusersSampler
from t2iprobe.pipelines import Pipeline, place_pipeline
from t2iprobe.runs import PlanEntry, build_plan
from t2iprobe.testing import FAMILIES, tiny_pipeline

PROMPTS = {f"thing.n.{i:02d}": {"base": f"An image of a thing {i}."} for i in range(4)}
PLAN = build_plan([{"samples": 2, "prompts": PROMPTS}], 0)


def make_sampler(family: str = "sd", dtype: str = "float32") -> DiffusersSampler:
    pipeline = tiny_pipeline(family)
    place_pipeline(pipeline, "cpu", dtype)
    return DiffusersSampler(pipeline, steps=4, guidance=5.0, dtype=dtype)


def draw(sampler: DiffusersSampler, entries: list[PlanEntry], batch: int) -> np.ndarray:
    batches = (sampler.sample(entries[start : start + batch]) for start in range(0, len(entries), batch))
    return np.stack([picture for pictures in batches for picture in pictures])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_is_the_same_in_any_batch_and_order(family: str) -> None:
    sampler = make_sampler(family)
    alone = draw(sampler, PLAN, 1)

    assert alone.shape == (8, 32, 32, 3)
    assert alone.dtype == np.uint8
    assert np.array_equal(draw(sampler, PLAN, 3), alone)
    assert np.array_equal(draw(make_sampler(family), PLAN[::-1], 16)[::-1], alone)
    assert len({picture.tobytes() for picture in alone}) == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_batches_agree_and_are_near_float32(family: str) -> None:
    half = make_sampler(family, "bfloat16")
    alone, together = draw(half, PLAN, 1).astype(int), draw(half, PLAN, 16).astype(int)
    exact = draw(make_sampler(family), PLAN, 1).astype(int)

    # How sums are ordered in a batch depends on the processor (AMX has tiles), but moves a picture less than
    # the rounding of bfloat16 itself does.
    assert np.abs(alone - together).mean() < 0.5 * np.abs(alone - exact).mean()
    assert np.abs(alone - together).max() <= max(2, np.abs(alone - exact).max())
    assert np.abs(alone - exact).mean() < 3


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_pictures_are_those_of_the_plain_call(family: str) -> None:
    pipeline = tiny_pipeline(family)
    generators = [torch.Generator().manual_seed(entry.seed) for entry in PLAN[:2]]
    plain = pipeline(
        prompt=[entry.prompt for entry in PLAN[:2]],
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=generators,
        output_type="np",
    ).images

    drawn = np.stack(make_sampler(family).sample(PLAN[:2]))

    assert np.abs(drawn - plain * 255).max() <= 1


def test_each_prompt_is_encoded_once_and_nothing_twice() -> None:
    sampler = make_sampler()
    texts: list[int] = []
    sampler.pipeline.text_encoder.register_forward_hook(
        lambda _, inputs, output: texts.append(len(inputs[0]))
    )

    draw(sampler, PLAN, 3)

    assert sum(texts) == len(PROMPTS) + 1  # the unconditional one


def break_decoder(pipeline: Pipeline, factor: float) -> None:
    """Scale the decoder's first layer up: its later norms do not care, but float16 overflows in between."""
    pipeline.vae.decoder.conv_in.weight.data *= factor
    pipeline.vae.decoder.conv_in.bias.data *= factor


def test_a_picture_that_overflows_float16_is_decoded_again() -> None:
    def make(dtype: str) -> Pipeline:
        pipeline = tiny_pipeline()
        break_decoder(pipeline, 1e5)
        place_pipeline(pipeline, "cpu", dtype)
        return pipeline

    def sample(dtype: str) -> np.ndarray:
        return np.stack(DiffusersSampler(make(dtype), steps=2, guidance=2.0, dtype=dtype).sample(PLAN[:2]))

    plain = make("float16")(PLAN[0].prompt, num_inference_steps=2, output_type="np").images
    half = sample("float16").astype(int)

    assert np.isnan(plain).any()
    assert np.abs(half - sample("float32")).mean() < 3
    assert half.std() > 5


def test_a_picture_that_stays_nan_is_named() -> None:
    sampler = make_sampler()
    sampler.pipeline.vae.decoder.conv_out.bias.data[:] = float("nan")

    with pytest.raises(UserError, match=r"base-0000 of thing\.n\.00 \('An image of a thing 0\.'\) holds NaN"):
        sampler.sample(PLAN[:2])

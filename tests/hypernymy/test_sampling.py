from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from two_stage_pipelines import tiny_kandinsky

from t2iprobe.decoding import DecoderWatch
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


def test_lanes_share_an_autoencoder_in_float16(capfd: pytest.CaptureFixture[str]) -> None:
    """diffusers casts SDXL's to float32 and back in each call: another lane would meet it half way."""
    pipeline = tiny_pipeline("sdxl")
    place_pipeline(pipeline, "cpu", "float16")
    settings = {"steps": 2, "guidance": 2.0, "dtype": "float16"}
    sampler = DiffusersSampler(pipeline, lanes=4, **settings)
    wanted = [DiffusersSampler(pipeline, **settings).sample([entry])[0] for entry in PLAN[:4]]

    with ThreadPoolExecutor(4) as pool:
        drawn = [pool.submit(sampler.sample, [PLAN[n % 4]]) for n in range(24)]

    for number, each in enumerate(drawn):
        assert np.array_equal(each.result()[0], wanted[number % 4])
    assert "float32" not in capfd.readouterr().err  # nor does it tell so each time


def test_a_compiled_decoder_is_copied_as_it_was() -> None:
    """To decode again in float32: a compiled forward is of the network that was copied, in float16."""
    pipeline = tiny_pipeline()
    place_pipeline(pipeline, "cpu", "float16")
    decoder = DecoderWatch(pipeline)
    plain = pipeline.vae.decoder.forward
    pipeline.vae.decoder.forward = lambda *given, **named: plain(*given, **named)  # as compile_networks does
    latents = torch.zeros(2, 4, 16, 16, dtype=torch.float16)
    with torch.inference_mode():
        pipeline.vae.decode(latents)
        found = decoder.mend(np.full((2, 32, 32, 3), [[[[0.5]]], [[[np.nan]]]]))
    assert (found[0] == 0.5).all()
    assert np.isfinite(found[1]).all()


def test_what_a_pipeline_refuses_is_told_in_one_line() -> None:
    sampler = make_sampler("ldm")  # which looks at its size when it draws
    sampler.configure(steps=2, guidance=None, size=65)
    with pytest.raises(UserError, match=r"LDMTextToImagePipeline cannot draw .* by DDIM.*divisible by 8"):
        sampler.sample(PLAN[:1])
    with pytest.raises(UserError, match="cannot draw 65 pixels"):
        make_sampler().configure(steps=2, guidance=None, size=65)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_stages_are_copied_for_each_batch(dtype: str) -> None:
    pipeline = tiny_kandinsky()
    place_pipeline(pipeline, "cpu", dtype)
    sampler = DiffusersSampler(pipeline, steps=2, guidance=4.0, size=64, dtype=dtype)
    first = np.stack(sampler.sample(PLAN[:2]))
    assert np.array_equal(first, np.stack(sampler.sample(PLAN[:2])))
    assert first.std() > 0
    assert pipeline.decoder_pipe.scheduler.timesteps.shape == (1000,)  # a batch has its own
    pipeline.movq.decoder.conv_out.bias.data[:] = float("nan")
    with pytest.raises(UserError, match="holds NaN"):
        sampler.sample(PLAN[:2])

"""The loss: what is drawn for it, what stays fixed, and that it is the denoiser's error."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from t2iprobe.errors import UserError
from t2iprobe.inversion.backbones import Diffusion, Flow, make_backbone
from t2iprobe.inversion.concepts import Concept, encode_moments, load_concept
from t2iprobe.inversion.embeddings import Rows
from t2iprobe.inversion.objective import PARTS, FixedInputs, denoising_losses, draw_inputs
from t2iprobe.testing import tiny_pipeline

SHAPE = (4, 16, 16)


@pytest.fixture
def concept(concept_folder: Path) -> Concept:
    return load_concept(concept_folder, "<cat>", size=32)


def test_the_same_key_draws_the_same_and_another_does_not(concept: Concept) -> None:
    one, same, other = (draw_inputs(concept, SHAPE, 8, (0, "<cat>", step)) for step in (3, 3, 4))
    assert torch.equal(one.noise, same.noise)
    assert torch.equal(one.latents, same.latents)
    assert one.captions == same.captions
    assert torch.equal(one.quantiles, same.quantiles)
    assert not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.noise, one.latents)


def test_stratified_inputs_hold_every_part_of_time_and_every_picture(concept: Concept) -> None:
    for step in range(20):
        inputs = draw_inputs(concept, SHAPE, 6, (step,))
        assert sorted((inputs.quantiles * 6).long().tolist()) == list(range(6))
        assert sorted(inputs.pictures.tolist()) == [0, 0, 1, 1, 2, 2]
    assert not draw_inputs(concept, SHAPE, 64, (0,), flip=False).flips.any()


@pytest.mark.parametrize("part", PARTS)
def test_a_zero_in_the_code_redraws_that_part_alone(concept: Concept, part: str) -> None:
    code = "".join("0" if name == part else "1" for name in PARTS)
    fixed = FixedInputs(concept, SHAPE, 8, 0, code=code)
    one, other = fixed.at(10), fixed.at(20)
    changed = {
        "images": not torch.equal(one.pictures, other.pictures) or not torch.equal(one.flips, other.flips),
        "latents": not torch.equal(one.latents, other.latents),
        "noise": not torch.equal(one.noise, other.noise),
        "captions": one.captions != other.captions,
        "timesteps": not torch.equal(one.quantiles, other.quantiles),
    }
    assert changed == {name: name == part for name in PARTS}
    assert torch.equal(fixed.at(10).noise, one.noise)


@pytest.mark.parametrize("code", ["1111", "11112", "", "111111"])
def test_a_bad_code_is_told(concept: Concept, code: str) -> None:
    with pytest.raises(UserError, match="five of 0 and 1"):
        FixedInputs(concept, SHAPE, 8, 0, code=code)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_that_of_diffusers_scheduler(concept: Concept, prediction: str) -> None:
    pipeline = tiny_pipeline("sd")
    configuration = pipeline.scheduler.config
    pipeline.scheduler = DDPMScheduler.from_config(configuration, prediction_type=prediction)
    backbone = make_backbone(pipeline)
    moments = encode_moments(backbone, concept)
    inputs = draw_inputs(concept, moments.mean.shape[2:], 4, (0,))
    prompts = [caption.replace("<cat>", "cat") for caption in inputs.captions]
    with torch.no_grad():
        losses = denoising_losses(backbone, [moments], [inputs], prompts)
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        times = (inputs.quantiles * 1000).long()
        clean = moments.sample(inputs.pictures, inputs.flips, inputs.latents)
        noisy = scheduler.add_noise(clean, inputs.noise, times)
        context = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
        made = pipeline.unet(noisy, times, context).sample
        target = {
            "epsilon": inputs.noise,
            "v_prediction": scheduler.get_velocity(clean, inputs.noise, times),
            "sample": clean,
        }[prediction]
    assert torch.allclose(losses, (made - target).square().mean((1, 2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMDPMSolverMultistepScheduler(),
        EDMEulerScheduler.from_config(DDPMScheduler().config),
        FlowMatchEulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
)
def test_a_scheduler_of_another_process_is_told(scheduler: Any) -> None:
    pipeline = tiny_pipeline("sd")
    pipeline.scheduler = scheduler
    with pytest.raises(UserError, match="training knows no scheduler without betas"):
        make_backbone(pipeline)


def test_stable_diffusions_schedulers_have_betas() -> None:
    for kind in (DDPMScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler, UniPCMultistepScheduler):
        assert Diffusion(kind()).prediction == "epsilon"


def test_flow_goes_straight_from_latents_to_noise() -> None:
    flow = Flow()
    clean, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    times = torch.tensor([0.0, 250.0, 1000.0])
    noisy, velocity = flow.mix(clean, noise, times)
    assert torch.equal(noisy[0], clean[0])
    assert torch.allclose(noisy[2], noise[2])
    assert torch.allclose(noisy[1] - 0.25 * velocity[1], clean[1], atol=1e-6)
    drawn = flow.times(torch.linspace(0.001, 0.999, 999)) / 1000
    logits = torch.log(drawn / (1 - drawn))  # logit-normal
    assert abs(float(logits.mean())) < 0.01
    assert abs(float(logits.std()) - 1) < 0.03


@pytest.mark.parametrize("family", ["sd", "sdxl", "ldm", "flux"])
def test_every_family_has_a_loss_with_a_gradient_for_its_rows(family: str, concept_folder: Path) -> None:
    from t2iprobe.inversion.embeddings import Rows

    backbone = make_backbone(tiny_pipeline(family))
    concept = load_concept(concept_folder, "<cat>", size=backbone.size)
    moments = encode_moments(backbone, concept)
    rows = Rows(backbone.encoders, {"<cat>": 2})
    rows.set("<cat>", rows.from_words("<cat>", ["thing"]))
    inputs = draw_inputs(concept, moments.mean.shape[2:], 2, (0,))
    losses = denoising_losses(backbone, [moments], [inputs], [rows.expand(c) for c in inputs.captions])
    assert losses.shape == (2,)
    losses.mean().backward()
    for parameter in rows.parameters("<cat>").values():
        assert (parameter.grad.abs().sum(1) > 0).all()
    assert all(p.grad is None for p in backbone.denoiser.parameters())


def test_captions_that_were_read_before_are_those_of_the_pipeline() -> None:
    """Read once, until the tokenizer has other tokens: then the same caption is another one."""
    backbone = make_backbone(tiny_pipeline("sd"))
    prompts = ["a photo of a <cat>", "a <dog>", "a photo of a <cat>", "words " * 90]

    def check() -> torch.Tensor:
        expected, _ = backbone.pipeline.encode_prompt(prompts, backbone.device, 1, False)
        found = [backbone.encode(prompts)["encoder_hidden_states"] for _ in range(2)]
        assert all(torch.equal(each, expected) for each in found)
        return expected

    before = check()
    for order in (["<cat>", "<dog>"], ["<dog>", "<cat>"]):
        rows = Rows(backbone.encoders, dict.fromkeys(order, 1))
        for number, token in enumerate(order):
            rows.set(token, {"clip_l": torch.full_like(rows.vectors(token)["clip_l"], 1.0 + number)})
        assert not torch.allclose(check(), before)
        rows.remove()
        assert torch.equal(check(), before)


def test_a_size_that_a_family_cannot_draw_is_told() -> None:
    assert make_backbone(tiny_pipeline("sd"), size=24).size == 24
    with pytest.raises(UserError, match="a multiple of 16 pixels a side, not 24: change --size"):
        make_backbone(tiny_pipeline("flux"), size=24)


def test_a_family_that_cannot_be_trained_is_told() -> None:
    class KandinskyPipeline: ...

    with pytest.raises(UserError, match="KandinskyPipeline cannot be taught"):
        make_backbone(KandinskyPipeline())

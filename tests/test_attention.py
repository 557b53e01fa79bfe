"""Another attention draws the same, and one that is not there is told."""

import numpy as np
import pytest
from small_networks import PLAN, make_sampler

from t2iprobe.errors import UserError


@pytest.mark.parametrize(
    ("family", "attention"), [("sd", "_native_math"), ("sdxl", "native"), ("flux", "_native_math")]
)
def test_another_attention_draws_the_same(family: str, attention: str) -> None:
    pictures = np.stack(make_sampler(family, attention).sample(PLAN)).astype(int)
    assert np.abs(pictures - np.stack(make_sampler(family).sample(PLAN))).max() <= 1


def test_flux_attends_by_what_was_chosen() -> None:
    pipeline = make_sampler("flux", "_native_math").pipeline
    chosen = {str(each._attention_backend) for each in pipeline.transformer.attn_processors.values()}
    assert len(chosen) == 1
    assert "math" in chosen.pop().lower()


@pytest.mark.parametrize(
    ("family", "attention", "message"),
    [
        ("sd", "sagee", "diffusers has no attention 'sagee', did you mean sage"),
        ("sd", "sage", "the unet of a StableDiffusionPipeline attends by native, _native_math or xformers"),
        ("sd", "xformers", "the attention 'xformers' cannot be used here"),
        ("flux", "sage", "the attention 'sage' cannot be used here"),
    ],
)
def test_an_attention_that_is_not_there_is_told(family: str, attention: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        make_sampler(family, attention)
    assert "\n" not in str(raised.value)

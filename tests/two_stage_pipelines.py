"""A tiny random Kandinsky 2.2, whose two stages are pipelines themselves."""

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    KandinskyV22CombinedPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from t2iprobe.testing import tiny_tokenizer

_ENCODER = {
    "hidden_size": 32,
    "projection_dim": 32,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


def tiny_kandinsky() -> Any:
    """Build the pipeline; it draws 64 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline: Any = KandinskyV22CombinedPipeline(
            unet=UNet2DConditionModel(
                in_channels=4,
                out_channels=8,
                addition_embed_type="image",
                down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
                mid_block_type="UNetMidBlock2DSimpleCrossAttn",
                block_out_channels=(32, 64),
                layers_per_block=1,
                encoder_hid_dim=32,
                encoder_hid_dim_type="image_proj",
                cross_attention_dim=32,
                attention_head_dim=4,
                resnet_time_scale_shift="scale_shift",
            ),
            scheduler=DDIMScheduler(),
            movq=VQModel(
                block_out_channels=[32, 64],
                down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
                up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=8,
                norm_type="spatial",
                num_vq_embeddings=12,
                vq_embed_dim=4,
            ),
            prior_prior=PriorTransformer(
                num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1
            ),
            prior_image_encoder=CLIPVisionModelWithProjection(
                CLIPVisionConfig(image_size=32, patch_size=8, **_ENCODER)
            ),
            prior_text_encoder=CLIPTextModelWithProjection(
                CLIPTextConfig(vocab_size=514, bos_token_id=512, eos_token_id=513, **_ENCODER)
            ),
            prior_tokenizer=tiny_tokenizer(),
            prior_scheduler=UnCLIPScheduler(
                variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
            ),
            prior_image_processor=CLIPImageProcessor(),
        )
    pipeline.prior_prior.clip_std.data.fill_(1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

"""Tiny random pipelines of common families, built in code: for tests, and to try a command without weights.

They draw noise, not pictures, but every code path is the one that a trained model of the family takes.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from t2iprobe.pipelines import Pipeline

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5Tokenizer

MAX_TOKENS = 77
VOCABULARY = 514  # 256 bytes, 256 bytes that end a word, start, end


def tiny_pipeline(family: str = "sd", seed: int = 0) -> Pipeline:
    """Build a random text-to-image pipeline of a family (see FAMILIES) that draws 32 pixels.

    The same seed gives the same weights. `save_pretrained` of the result writes an ordinary pipeline folder.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FAMILIES[family]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_tokenizer() -> "CLIPTokenizer":
    """Build a CLIP tokenizer whose words are single bytes, so that any prompt can be read."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    tokenizer.model_max_length = MAX_TOKENS  # otherwise 1e30
    return tokenizer


def tiny_t5_tokenizer() -> "T5Tokenizer":
    """Build a T5 tokenizer whose pieces are single printable characters."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [("▁", -2.0), *((chr(code), -2.0) for code in range(33, 127))]
    tokenizer = T5Tokenizer(vocab=[*special, *pieces], extra_ids=0)
    tokenizer.model_max_length = MAX_TOKENS
    return tokenizer


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=128,  # more than the tokenizer has, as in the published ones
        d_model=64,
        d_kv=8,
        d_ff=37,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def _clip_config(**more: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
        **more,
    )


def _autoencoder(**more: Any) -> Any:
    from diffusers import AutoencoderKL

    autoencoder: Any = AutoencoderKL(
        **{
            "block_out_channels": (32, 64),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "sample_size": 32,
            "latent_channels": 4,
            **more,
        }
    )
    return autoencoder.eval()


def _unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(
        **{
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "sample_size": 16,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32,
            **more,
        }
    )
    return unet.eval()


def _ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _stable_diffusion() -> Pipeline:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    return StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(_clip_config()).eval(),
        tokenizer=tiny_tokenizer(),
        unet=_unet(),
        scheduler=_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl() -> Pipeline:
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = _unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,  # six sizes and crops × 8, and the pooled text of 32
    )
    return StableDiffusionXLPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(_clip_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(projection_dim=32)).eval(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=_ddim(),
        add_watermarker=False,
    )


def _latent_diffusion() -> Pipeline:
    from diffusers import LDMTextToImagePipeline
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    config = LDMBertConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        head_dim=8,
        max_position_embeddings=MAX_TOKENS,
    )
    return LDMTextToImagePipeline(
        vqvae=_autoencoder(
            block_out_channels=(32, 32, 32, 64),  # the pipeline divides sizes by 8 itself
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        bert=LDMBertModel(config).eval(),
        tokenizer=tiny_tokenizer(),
        unet=_unet(sample_size=4),
        scheduler=_ddim(),
    )


def _latent_consistency() -> Pipeline:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler
    from transformers import CLIPTextModel

    return LatentConsistencyModelPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(_clip_config()).eval(),
        tokenizer=tiny_tokenizer(),
        unet=_unet(time_cond_proj_dim=32),  # guidance is embedded
        scheduler=LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _flow_autoencoder() -> Any:
    return _autoencoder(
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159
    )


def _flux() -> Pipeline:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    transformer: Any = FluxTransformer2DModel(
        in_channels=16,  # squares of four latents
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline: Any = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_flow_autoencoder(),
        text_encoder=CLIPTextModel(_clip_config()).eval(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=tiny_t5_tokenizer(),
        transformer=transformer.eval(),
    )
    pipeline.default_sample_size = 16  # which no configuration keeps: saved and loaded it draws 256 pixels
    return pipeline


def _stable_diffusion_3() -> Pipeline:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    transformer: Any = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,  # both CLIPs' 32
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_flow_autoencoder(),
        text_encoder=CLIPTextModelWithProjection(_clip_config(projection_dim=32)).eval(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(projection_dim=32)).eval(),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=_t5(),
        tokenizer_3=tiny_t5_tokenizer(),
    )


FAMILIES: dict[str, Callable[[], Pipeline]] = {
    "sd": _stable_diffusion,
    "sdxl": _stable_diffusion_xl,
    "ldm": _latent_diffusion,
    "lcm": _latent_consistency,
    "flux": _flux,
    "sd3": _stable_diffusion_3,
}

"""A tiny random CLIP in transformers' folder layout, for judges that really load one."""

from pathlib import Path

from t2iprobe.testing import tiny_tokenizer


def save_clip(path: Path) -> Path:
    """Write the CLIP, which reads pictures of 32 pixels and any text, into a folder; returns it."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    shape = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 514, "max_position_embeddings": 77, "eos_token_id": 513, "bos_token_id": 512}
    vision = {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config={**shape, **text}, vision_config={**shape, **vision}, projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tiny_tokenizer()).save_pretrained(path)
    return path

"""Tiny random language models of many families, and random trees for them."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCABULARY = 37
CONTEXT = 64
WINDOW = 5
_SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "max_position_embeddings": CONTEXT},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED),
    "qwen2 with windows": lambda: transformers.Qwen2Config(
        **_GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "gemma2": lambda: transformers.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=WINDOW),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_GROUPED,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**_GROUPED, no_rope_layers=[1, 0, 1]),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**_SIZES),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2, bos_token_id=1, eos_token_id=2),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED),
    "opt": lambda: transformers.OPTConfig(
        **{name: value for name, value in _SIZES.items() if name != "intermediate_size"},
        ffn_dim=48,
        word_embed_proj_dim=32,
    ),
}
_PICTURES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_GEMMA4 = _GROUPED | {"head_dim": 8, "global_head_dim": 16, "sliding_window": WINDOW}
_KINDS = ["sliding_attention", "full_attention"]
# Whose checkpoints have other names than the model, or tensors that it holds as one, or learned buffers.
AWKWARD: dict[str, Callable[[], Any]] = {
    "gemma3 with pictures": lambda: transformers.Gemma3Config(
        text_config=_GROUPED | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": [*_KINDS, _KINDS[0]]},
        vision_config=_PICTURES | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    ),
    "gemma4": lambda: transformers.Gemma4TextConfig(
        **_GEMMA4 | {"num_hidden_layers": 4}, layer_types=_KINDS * 2, hidden_size_per_layer_input=0
    ),
    "gemma4 with shared keys": lambda: transformers.Gemma4TextConfig(
        **_GEMMA4 | {"num_hidden_layers": 4},
        layer_types=_KINDS * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
    ),
    "qwen3 with experts": lambda: transformers.Qwen3MoeConfig(
        **_GROUPED, head_dim=8, num_experts=11, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_GROUPED, num_local_experts=3),
}


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A model of `family` whose random weights are so large that every token it sees matters."""
    torch.manual_seed(seed)
    config = (FAMILIES | AWKWARD)[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
        stored = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in stored:
                buffer.uniform_(0.5, 1.5)
    return model


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Tokens that are not special."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def random_tree(nodes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ancestors of each node, itself included, bool [n, n], and its depth [n]; parents come first."""
    generator = torch.Generator().manual_seed(seed)
    ancestors = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        ancestors[node] |= ancestors[torch.randint(node, (), generator=generator)]
    return ancestors, ancestors.sum(1) - 1


def plain_logits(model: Any, text: torch.Tensor) -> torch.Tensor:
    """What the model itself says follows `text` [T], without any cache: [V]."""
    with torch.no_grad():
        return model(text[None]).logits[0, -1]

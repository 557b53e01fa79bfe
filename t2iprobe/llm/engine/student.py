"""The distilled student of the packaged target: a few layers between the target's own embedding and head."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from t2iprobe.errors import UserError

FOLDER = Path(__file__).parents[2] / "assets" / "draft_model"
# What a target must have in common with the one that the student was taught by.
_SHARED = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "tie_word_embeddings"),
)


def load_student(target: Any, folder: Path = FOLDER) -> Any:
    """Load the student as a transformers model whose embedding, head and rotary angles are `target`'s own.

    It costs no more than its layers' bytes, in the target's dtype. Raises UserError for a target that is not
    the packaged SmolLM2, or one like it.
    """
    described = json.loads((folder / "config.json").read_text())
    for name in _SHARED:
        found = getattr(target.config, name, None)
        if found != described[name]:
            raise UserError(
                f"the student drafts only for SmolLM2-135M-Instruct ({name}: {described[name]}, this target: "
                f"{found}): choose the draft early-exit:K, lookup, copy:BITS or a model"
            )
    student = student_of(target, described["num_hidden_layers"])
    stored = load_file(folder / "model.safetensors")
    for name, parameter in own_parameters(student).items():
        if name in stored:
            parameter.copy_(stored[name])
            continue
        # 8-bit groups of rows: codes [groups, rows, columns], a scale and a minimum [groups, 1, columns]
        codes, scale, minimum = (stored[f"{name}.{part}"] for part in ("codes", "scale", "minimum"))
        parameter.copy_(torch.addcmul(minimum, codes.float(), scale).view(parameter.shape))
    return student


def student_of(target: Any, layers: int) -> Any:
    """Make a model like `target` with `layers` decoder layers of undefined weights, in evaluation mode. Its
    embedding, head and rotary angles are the target's modules; its layers and final norm are its own.
    """
    config = type(target.config).from_dict({**target.config.to_dict(), "num_hidden_layers": layers})
    with torch.device("meta"):
        student = type(target)(config)
    student.model.embed_tokens, student.model.rotary_emb = target.model.embed_tokens, target.model.rotary_emb
    student.lm_head = target.lm_head
    place, dtype = target.lm_head.weight.device, target.lm_head.weight.dtype
    student.model.layers.to_empty(device=place).to(dtype)
    student.model.norm.to_empty(device=place).to(dtype)
    student.config._attn_implementation = target.config._attn_implementation
    return student.requires_grad_(False).eval()


def own_parameters(student: Any) -> dict[str, torch.Tensor]:
    """Return the student's own parameters, those that are stored, by their names in the model."""
    return {
        name: parameter
        for name, parameter in student.model.named_parameters()
        if not name.startswith("embed_tokens.")
    }

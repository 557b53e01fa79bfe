"""The packaged student: small, the target's own embedding and head, useful, and for no other target."""

import json
from pathlib import Path

import pytest
import torch

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.student import FOLDER, load_student, own_parameters

# Floors well below what the weights were measured at on these texts.
FIRST, AMONG_EIGHT = 0.40, 0.70
TEXTS = json.loads(Path(__file__).with_name("student_texts.json").read_text())


@pytest.fixture(scope="module")
def target():
    pytest.importorskip("gguf")
    from t2iprobe.llm.models import find_language_model, load_language_model

    try:
        return load_language_model(find_language_model("smollm2"))
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def student(target):
    return load_student(target)


def toy_target(**changed):
    from transformers import LlamaConfig, LlamaForCausalLM

    described = json.loads((FOLDER / "config.json").read_text()) | {"num_hidden_layers": 1, **changed}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig.from_dict(described))


def test_the_files_take_at_most_16_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16_000_000


def test_embedding_and_head_are_the_targets_own_tensors(target, student):
    assert student.get_input_embeddings().weight is target.get_input_embeddings().weight
    assert student.get_output_embeddings().weight is target.get_output_embeddings().weight
    own = sum(parameter.numel() for parameter in own_parameters(student).values())
    assert own + target.lm_head.weight.numel() == sum(p.numel() for p in student.parameters())


def test_its_weights_are_finite_and_in_place(student):
    for name, parameter in student.named_parameters():
        assert not parameter.is_meta, name
        assert parameter.isfinite().all(), name
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad


@torch.inference_mode()
def test_it_guesses_what_the_target_writes_after_held_out_prompts(target, student):
    first = among_eight = total = 0
    for text in TEXTS:
        tokens, begin = torch.tensor(text["tokens"]), text["prompt_length"]
        # the stored texts are the target's greedy ones
        exact = target(tokens[None]).logits[0, begin - 1 : -1]
        assert (exact.argmax(-1) == tokens[begin:]).float().mean() > 0.98
        logits = student(tokens[None]).logits[0, begin - 1 : -1]
        rank = (logits > logits.gather(1, tokens[begin:, None])).sum(1)
        first, among_eight, total = (
            first + int((rank < 1).sum()),
            among_eight + int((rank < 8).sum()),
            total + len(rank),
        )
    assert total > 100
    assert first / total > FIRST
    assert among_eight / total > AMONG_EIGHT


@pytest.mark.parametrize("changed", [{"hidden_size": 288}, {"vocab_size": 32000}, {"num_key_value_heads": 9}])
def test_another_target_is_refused(changed):
    with pytest.raises(UserError, match=f"SmolLM2-135M-Instruct.*{next(iter(changed))}"):
        load_student(toy_target(**changed))

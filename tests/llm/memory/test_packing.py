import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from full_disk import file_limit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from t2iprobe.errors import UserError
from t2iprobe.llm.memory import packing
from t2iprobe.llm.memory.packing import BLOCK, Packed, open_packed, pack_layers, read_rest
from t2iprobe.llm.models import find_language_model, name_tensors
from t2iprobe.llm.naming import Naming


def save_checkpoint(folder: Path, *names: str, shape: tuple[int, ...] = (3, 5)) -> Path:
    """A checkpoint with these tensors, each filled with its own number."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.full(shape, float(number)) for number, name in enumerate(names)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def layer_names(packed: Packed) -> list[list[str]]:
    return [sorted(layer.layout) for layer in packed.layers]


def test_packed_files_hold_every_tensor_of_the_model(llama: Path, packed: Packed) -> None:
    state = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    assert packed.prefix == "model.layers"
    found = {
        f"model.layers.{number}.{name}": tensor
        for number, layer in enumerate(packed.layers)
        for name, tensor in load_file(layer.path).items()  # as any reader of safetensors sees it
    } | load_file(packed.rest.path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


_PACK_WHEN_TOLD = """
import sys, time
from pathlib import Path
from t2iprobe.llm.memory import packing

written, write = [], packing.write_atomically

def write_slowly(path, content):
    written.append(path.name)
    time.sleep(0.05)
    write(path, content)

packing.write_atomically = write_slowly
folder, out, ready, go = map(Path, sys.argv[1:])
ready.touch()
while not go.exists():
    time.sleep(0.001)
packed = packing.pack_layers(folder, out)
packing.pack_quantized(packed, out.with_name("quantized"))
print(len(written))
"""


def test_two_processes_pack_a_model_once(llama: Path, packed: Packed, tmp_path: Path) -> None:
    go, ready = tmp_path / "go", [tmp_path / "ready0", tmp_path / "ready1"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PACK_WHEN_TOLD, llama, tmp_path / "out", each, go],
            stdout=subprocess.PIPE,
            text=True,
        )
        for each in ready
    ]
    while not all(each.exists() for each in ready):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    go.touch()
    written = [int(process.communicate(timeout=100)[0]) for process in processes]
    files = sorted(path.name for path in packed.folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    assert sum(written) == 2 * len(files)  # each file of both forms by one of the two
    for name in files:
        if name != packing.INDEX:
            assert (tmp_path / "out" / name).read_bytes() == (packed.folder / name).read_bytes()


def test_layouts_tell_where_tensors_lie_in_the_file(packed: Packed) -> None:
    for file in (*packed.layers, packed.rest):
        raw = file.path.read_bytes()
        assert file.start % BLOCK == 0
        assert file.start + file.nbytes == len(raw)
        data = torch.frombuffer(bytearray(raw[file.start :]), dtype=torch.uint8)
        views = packing.view_tensors(file.layout, data)
        for name, tensor in load_file(file.path).items():
            assert torch.equal(views[name], tensor)
            assert views[name].data_ptr() == data.data_ptr() + file.layout[name].offset


def test_the_rest_is_read_whole(llama: Path, packed: Packed) -> None:
    state = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    rest = read_rest(packed)
    assert sorted(rest) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in rest.items())


def test_shards_pack_as_one_file_does(llama: Path, packed: Packed, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 4
    again = pack_layers(tmp_path / "shards", tmp_path / "again")
    for one, other in zip((*packed.layers, packed.rest), (*again.layers, again.rest), strict=True):
        assert (one.layout, one.checksum) == (other.layout, other.checksum)


def test_layers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"transformer.h.{layer}.mlp.weight" for layer in range(12)]
    packed = pack_layers(save_checkpoint(tmp_path / "model", *names), tmp_path / "packed")
    assert packed.prefix == "transformer.h"
    values = [load_file(layer.path)["mlp.weight"][0, 0].item() for layer in packed.layers]
    assert values == list(range(12))


def test_the_layer_list_is_the_largest_one_and_experts_are_no_layers(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.w" for layer in range(2) for expert in range(3)]
    other = ["vision.blocks.0.w", "vision.blocks.1.w", "vision.blocks.2.w", "head"]
    packed = pack_layers(save_checkpoint(tmp_path / "model", *names, *other), tmp_path / "packed")
    assert layer_names(packed) == [["mlp.experts.0.w", "mlp.experts.1.w", "mlp.experts.2.w"]] * 2
    assert sorted(packed.rest.layout) == sorted(other)


def test_what_a_model_computes_itself_is_left_out(tmp_path: Path) -> None:
    computed = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")
    weights = ("attention.dense.bias", "attention.dense.weight")
    names = [f"gpt_neox.layers.{layer}.{name}" for layer in range(2) for name in computed + weights]
    folder = save_checkpoint(tmp_path / "model", *names, "embed", "rotary_emb.inv_freq")
    packed = pack_layers(folder, tmp_path / "packed")
    assert layer_names(packed) == [sorted(weights)] * 2
    assert sorted(packed.rest.layout) == ["embed"]


def test_only_floating_point_tensors_are_cast(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    weight = torch.randn(4, 4)
    tensors = {"layers.0.w": weight.bfloat16(), "layers.0.n": torch.arange(3), "head": weight.half()}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    packed = pack_layers(tmp_path / "model", tmp_path / "packed", "float32")
    assert packed.layers[0].layout["w"].dtype == torch.float32
    assert torch.equal(load_file(packed.layers[0].path)["w"], weight.bfloat16().float())
    assert packed.layers[0].layout["n"].dtype == torch.int64
    assert torch.equal(read_rest(packed)["head"], weight.half().float())


def test_a_packed_model_is_opened_and_not_written_again(llama: Path, packed: Packed) -> None:
    written = {path: path.stat().st_mtime_ns for path in packed.folder.iterdir()}
    assert pack_layers(llama, packed.folder) == packed == open_packed(packed.folder)
    assert {path: path.stat().st_mtime_ns for path in packed.folder.iterdir()} == written


def test_a_killed_run_is_continued(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, written = tmp_path / "packed", []
    write = packing.write_atomically

    def die(path: Path, content: bytes) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write(path, content)
        written.append(path.name)

    monkeypatch.setattr(packing, "write_atomically", die)
    with pytest.raises(KeyboardInterrupt):
        pack_layers(llama, out)
    with pytest.raises(UserError, match="holds no packed model"):
        open_packed(out)
    monkeypatch.setattr(
        packing, "write_atomically", lambda *args: (write(*args), written.append(args[0].name))
    )
    packed = pack_layers(llama, out)
    files = [f"layer_{layer:03}.safetensors" for layer in range(4)]
    assert written == [*files, "rest.safetensors", "index.json"]
    assert packed == open_packed(out)


def test_a_changed_model_or_dtype_is_packed_anew(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", "embed", "layers.0.w")
    packed = pack_layers(folder, tmp_path / "packed")
    assert load_file(packed.layers[0].path)["w"][0, 0] == 1
    save_checkpoint(folder, "embed", "other", "layers.0.w")
    packed = pack_layers(folder, tmp_path / "packed")
    assert load_file(packed.layers[0].path)["w"][0, 0] == 2
    packed = pack_layers(folder, tmp_path / "packed", "float16")
    assert packed.layers[0].layout["w"].dtype == torch.float16


def test_a_full_disk_is_told_and_can_be_continued(llama: Path, tmp_path: Path) -> None:
    with file_limit(1000), pytest.raises(UserError, match="is full"):
        pack_layers(llama, tmp_path / "packed")
    assert len(pack_layers(llama, tmp_path / "packed").layers) == 4


def test_models_that_cannot_be_packed(tmp_path: Path) -> None:
    def refuse(folder: Path, told: str) -> None:
        with pytest.raises(UserError, match=re.escape(told)) as error:
            pack_layers(folder, tmp_path / "packed")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "packed" / "index.json").exists()

    refuse(tmp_path / "nowhere", "nowhere has no model.safetensors")
    refuse(save_checkpoint(tmp_path / "a", "embed"), "no numbered layers")
    refuse(save_checkpoint(tmp_path / "b", "layers.0.w", "layers.2.w"), "lacks layers.1")
    folder = save_checkpoint(tmp_path / "c", "layers.0.w")
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-1])
    refuse(folder, "cannot read")
    index = folder / "model.safetensors.index.json"
    index.write_text("{")
    refuse(folder, "index.json is damaged")
    index.write_text(json.dumps({"weight_map": {"layers.0.w": "part.safetensors"}}))
    refuse(folder, "part.safetensors")
    index.write_text(json.dumps({"weight_map": {"layers.0.other": "model.safetensors"}}))
    (folder / "model.safetensors").write_bytes(raw)
    refuse(folder, "cannot read")


def test_layers_that_are_not_the_models_are_refused_before_anything_is_written(
    llama: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "model", tmp_path / "packed"
    shutil.copytree(llama, folder)
    files = find_language_model(str(folder))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.3.mlp.scale": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(
        UserError, match=r"they hold model\.layers\.3\.mlp\.scale, which llama models have no place"
    ):
        pack_layers(folder, out, None, lambda: name_tensors(files))
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"they lack model\.layers\.3\.mlp\.up_proj\.weight"):
        pack_layers(folder, out, None, lambda: name_tensors(files))
    assert not out.exists()


def test_what_was_packed_by_the_checkpoints_names_is_packed_anew(llama: Path, packed: Packed) -> None:
    files, asked = find_language_model(str(llama)), []

    def name() -> Naming:
        asked.append(1)
        return name_tensors(files)

    for _ in range(2):
        assert pack_layers(llama, packed.folder, None, name).layers[0].layout == packed.layers[0].layout
    assert len(asked) == 1


@pytest.mark.parametrize("victim", ["layer_002.safetensors", "rest.safetensors", "index.json"])
@pytest.mark.parametrize("damage", ["truncated", "headless", "empty", "longer", "missing"])
def test_a_damaged_file_is_named(packed: Packed, victim: str, damage: str) -> None:
    path = packed.folder / victim
    raw = path.read_bytes()
    changed = {"truncated": raw[:-1], "headless": raw[20:], "empty": b"", "longer": raw + b"}"}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    with pytest.raises(UserError, match=victim.replace(".", r"\.")) as error:
        open_packed(packed.folder)
    assert "\n" not in str(error.value)


def test_a_file_of_another_model_is_named(packed: Packed, llama: Path, tmp_path: Path) -> None:
    other = pack_layers(llama, tmp_path / "other", "float64")
    shutil.copy(other.layers[1].path, packed.layers[1].path)
    with pytest.raises(UserError, match="layer_001.safetensors has changed"):
        open_packed(packed.folder)


def test_every_changed_byte_of_the_rest_is_seen(packed: Packed) -> None:
    raw = bytearray(packed.rest.path.read_bytes())
    raw[-1] ^= 1
    packed.rest.path.write_bytes(raw)
    with pytest.raises(UserError, match="rest.safetensors is damaged"):
        read_rest(open_packed(packed.folder))

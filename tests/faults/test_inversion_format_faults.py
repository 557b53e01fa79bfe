"""Embedding and adapter files that are damaged, hostile or not what they seem, and disks that are full."""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import file_limit
from safetensors.torch import save_file

from t2iprobe.errors import UserError
from t2iprobe.inversion.formats import (
    FORMS,
    Embedding,
    convert,
    inspect,
    read_custom_diffusion,
    read_embedding,
    write_custom_diffusion,
    write_embedding,
)


def make_embedding() -> Embedding:
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    return Embedding("<cat>", {"": rows}, {"stop_reason": "flat"})


def make_files(folder: Path) -> list[Path]:
    """One file of every kind."""
    made = [
        write_embedding(
            folder / f"{form}.{'pt' if form == 'a1111-pt' else 'safetensors'}", make_embedding(), form
        )
        for form in FORMS
    ]
    weights = {"block.attn2": (torch.ones(4, 2), torch.ones(4, 2))}
    custom = write_custom_diffusion(folder, weights)
    names = ("unet.block.attn2.to_k.lora_A.weight", "unet.block.attn2.to_k.lora_B.weight")
    save_file(
        dict(zip(names, (torch.ones(2, 768), torch.ones(8, 2)), strict=True)), folder / "lora.safetensors"
    )
    torch.save({"<cat>": torch.ones(2, 32)}, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    return [
        *(path for paths in made for path in paths),
        custom,
        folder / "lora.safetensors",
        folder / "legacy.bin",
    ]


def complaints(path: Path) -> Iterator[str]:
    """Read a file by every reader and yield what each says is wrong with it."""
    for read in (inspect, read_embedding, read_custom_diffusion):
        try:
            read(path)
        except UserError as error:
            yield str(error)


def test_truncated_files_are_told_in_one_line(tmp_path: Path) -> None:
    for path in make_files(tmp_path):
        content = path.read_bytes()
        for size in sorted({*range(0, 12), *range(12, len(content), max(1, len(content) // 25))}):
            cut = tmp_path / f"cut{path.suffix}"
            cut.write_bytes(content[:size])
            with pytest.raises(UserError) as raised:
                inspect(cut)
            assert "\n" not in str(raised.value)
            assert str(cut) in str(raised.value)


def test_changed_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for path in make_files(tmp_path):
        content = path.read_bytes()
        for where in torch.randint(min(len(content), 700), (25,), generator=generator).tolist():
            for value in (0, 0x7B, 0xFF):
                changed = tmp_path / f"changed{path.suffix}"
                changed.write_bytes(content[:where] + bytes([value]) + content[where + 1 :])
                for complaint in complaints(changed):
                    assert "\n" not in complaint
                    assert str(changed) in complaint


class Evil:
    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> Any:
        return Path.touch, (self.trap,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool) -> None:
    trap = tmp_path / "trap"
    hidden = {"string_to_param": {"*": torch.ones(1, 32)}, "name": Evil(trap)}
    for name, content in (("whole", Evil(trap)), ("within", hidden)):
        path = tmp_path / f"{name}.pt"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="code in it is never run") as raised:
            convert(path, tmp_path / "out.safetensors", "diffusers")
        assert "\n" not in str(raised.value)
    plain = io.BytesIO()
    pickle.dump(Evil(trap), plain)
    (tmp_path / "learned_embeds.bin").write_bytes(plain.getvalue())
    with pytest.raises(UserError, match="code in it is never run"):
        inspect(tmp_path)

    assert not trap.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_files_of_something_else_are_named(tmp_path: Path) -> None:
    save_file({"unet.conv_in.weight": torch.ones(2, 2)}, tmp_path / "checkpoint.safetensors")
    save_file({"<cat>": torch.full((1, 4), float("nan"))}, tmp_path / "nan.safetensors")
    save_file({"<cat>": torch.ones(2, dtype=torch.int64)}, tmp_path / "whole.safetensors")
    save_file({"<cat>": torch.ones(2, 2, 2)}, tmp_path / "cube.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    torch.save([1, 2], tmp_path / "list.bin")
    torch.save({"<cat>": "a picture of a cat"}, tmp_path / "text.bin")
    torch.save({"string_to_param": {}}, tmp_path / "none.pt")
    torch.save({3: torch.ones(2)}, tmp_path / "number.pt")
    torch.save({"unet.x.lora_A.weight": {}}, tmp_path / "lora.bin")
    torch.save({"x.attn2.processor.to_q_custom_diffusion.weight": torch.ones(2, 2)}, tmp_path / "query.bin")
    (tmp_path / "page.bin").write_text("<!DOCTYPE html><html>404</html>")
    (tmp_path / "folder").mkdir()
    messages = {
        "checkpoint.safetensors": r"neither an embedding nor LoRA .*: it holds unet\.conv_in\.weight",
        "nan.safetensors": "its rows hold NaN or infinity",
        "whole.safetensors": r"its rows are no matrix \[vectors, width\] of real numbers",
        "cube.safetensors": "its rows are no matrix",
        "empty.safetensors": "it holds no tensors",
        "list.bin": "holds list, not tensors by their names",
        "text.bin": "its rows are no matrix",
        "none.pt": "holds 0 embeddings under string_to_param, not one",
        "lora.bin": "unet.x.lora_A.weight is no matrix of weights",
        "query.bin": "trains q of x.attn2: only k and v can be loaded",
        "page.bin": "it is damaged, or no file of weights|its pickle is damaged",
        "folder": r"holds no learned_embeds\.safetensors, .*: name the file",
        "missing.pt": "cannot read .*missing.pt: No such file",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message) as raised:
            inspect(tmp_path / name)
        assert "\n" not in str(raised.value)
        assert name in str(raised.value)
    assert read_embedding(tmp_path / "number.pt")[0].token == "3"


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_the_old_file_or_none(tmp_path: Path, form: str) -> None:
    source = write_embedding(tmp_path / "source.safetensors", make_embedding(), "diffusers")[0]
    out = tmp_path / "out"
    out.mkdir()
    target = out / ("cat.pt" if form == "a1111-pt" else "cat.safetensors")

    with file_limit(100), pytest.raises(UserError, match="is full"):
        convert(source, target, form)
    assert list(out.iterdir()) == []

    convert(source, target, form)
    before = target.read_bytes()
    with file_limit(100), pytest.raises(UserError, match="is full"):
        convert(source, target, form, token="<dog>")
    assert target.read_bytes() == before
    assert list(out.iterdir()) == [target]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write .*nowhere.*No such file"):
        write_embedding(tmp_path / "nowhere" / "cat.safetensors", make_embedding(), "diffusers")
    (tmp_path / "cat.safetensors").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        write_embedding(tmp_path / "cat.safetensors", make_embedding(), "diffusers")

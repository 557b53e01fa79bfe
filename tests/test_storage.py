import errno
import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t2iprobe.errors import UserError
from t2iprobe.storage import (
    explain_full_disk,
    hash_files,
    is_utf8,
    read_arrays,
    read_lines,
    remove_leftovers,
    write_atomically,
    write_output,
)


def test_a_written_file_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", b"1")
    write_atomically(tmp_path / "a.json", b"2")

    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"2"


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    import t2iprobe.storage as storage

    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass
    dead = tmp_path / f".a.npz.{storage._HOST}+{child.pid}.tmp"
    living = tmp_path / f".b.npz.{storage._HOST}+{os.getpid()}.tmp"
    elsewhere = tmp_path / f".c.npz.other-host+{child.pid}.tmp"
    for path in (dead, living, elsewhere):
        path.touch()

    remove_leftovers(tmp_path)

    assert not dead.exists()
    assert living.exists()
    assert elsewhere.exists()


def test_only_line_breaks_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for content, lines in (
        ("", []),
        ("\n", [""]),
        ("a\u2028b\nc\u2029d\x85e\n\n", ["a\u2028b", "c\u2029d\x85e", ""]),
        ("\ufeffa\r\nb", ["a", "b"]),
    ):
        path.write_bytes(content.encode())
        assert read_lines(path) == lines


def test_only_a_full_disk_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk that holds .* is full"), explain_full_disk(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), explain_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_an_output_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write .*: No such file or directory"):
        write_output(tmp_path / "none" / "a.json", b"")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*: Not a directory"):
        write_output(tmp_path / "file" / "a.json", b"")
    with pytest.raises(UserError, match="cannot write .*: it is a folder"):
        write_output(tmp_path, b"")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="cannot write .*: it is no plain file"):
        write_output(tmp_path / "pipe", b"")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_changed_byte_is_found_or_changes_nothing(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.savez(content, indices=np.arange(2), logits=np.random.default_rng(0).normal(size=(20, 100)))
    whole, path = content.getvalue(), tmp_path / "a.npz"
    path.write_bytes(whole)
    arrays = read_arrays(path)
    found = 0
    for place in [*range(0, 700), *range(len(whole) - 300, len(whole))]:
        changed = bytearray(whole)
        changed[place] ^= 0x11 << place % 4
        path.write_bytes(changed)
        try:
            read = read_arrays(path)
        except (ValueError, OSError):
            found += 1
        else:  # a date, or the name of an array
            assert all(np.array_equal(read[name], arrays[name]) for name in read.keys() & arrays.keys())
    assert found > 500


def test_a_hash_follows_content_and_name_but_not_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w").write_bytes(b"weights")
    one, two = tmp_path / "one" / "w", tmp_path / "two" / "w"

    assert hash_files({"w": one}) == hash_files({"w": two})
    assert hash_files({"w": one}) != hash_files({"v": one})
    two.write_bytes(b"other weights")
    assert hash_files({"w": one}) != hash_files({"w": two})


@pytest.mark.parametrize(
    ("value", "right"),
    [
        (None, True), ("é 🦩", True), ({"a": ["é", 1]}, True), ("\udfff", False),
        ({"a": [{"\ud800": 1}]}, False), (os.fsdecode(b"\xff"), False),
    ],
)  # fmt: skip
def test_halves_of_surrogate_pairs_cannot_be_written(value: object, right: bool) -> None:
    assert is_utf8(value) is right

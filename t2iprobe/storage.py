"""Files that are whole or absent: atomic writes, leftovers of killed processes, full disks, hashes."""

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from t2iprobe.errors import UserError

_HOST = re.sub(r"\W", "-", socket.gethostname())
_TEMPORARY = re.compile(r"\..+\.(?P<host>[\w-]+)\+(?P<pid>\d+)\.tmp")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary name, sync it, rename it to `path`, sync the folder."""
    temporary = path.with_name(f".{path.name}.{_HOST}+{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_utf8(value: Any) -> bool:
    """Whether the texts of a JSON value can be written: halves of surrogate pairs and stray bytes cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that dead processes of this machine left in `folder`."""
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and match["host"] == _HOST and not _is_running(int(match["pid"])):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_lines(path: str | Path) -> list[str]:
    """Return a file's lines of JSON, UTF-8 with or without a byte order mark.

    Only a line break ends one: `str.splitlines` also splits at U+2028, U+2029 and U+0085, which JSON allows
    inside a text. Raises OSError and UnicodeDecodeError.
    """
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    return lines if lines[-1] else lines[:-1]


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk (or quota, or file size limit) while writing below `path` into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"the disk that holds {path} is full ({error.strerror}): everything stored so far is kept; "
            "make room, then run the same command to continue"
        ) from None


def open_exclusively(path: Path) -> IO[bytes]:
    """Open a file, made where it is missing, to read and append by this process alone.

    Raises UserError where another process has it open so, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115  # the caller's
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"another process writes {path}: wait for it, or write elsewhere") from None
    return file


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the right to make `folder`; where another process holds it, wait for that one to end.

    The lock is a file beside the folder, and outlives it. Raises UserError where it cannot be written.
    """
    path = folder.with_name(f".{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115  # closed below
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_output(path: Path) -> None:
    """Raise UserError where a path is there and is no file: a rename would put one in a device's place."""
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'no plain file'}")


def write_output(path: Path, content: bytes) -> None:
    """Write a file that a person asked for. Raises UserError where that cannot be done."""
    check_output(path)
    try:
        with explain_full_disk(path):
            write_atomically(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


# What zipfile and numpy were seen to raise for archives with a changed byte.
_DAMAGE = (
    *(ValueError, KeyError, EOFError, TypeError, AttributeError, RuntimeError, MemoryError, OverflowError),
    *(SyntaxError, zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read an npz archive and check its checksums: name → array.

    Raises OSError or ValueError where the file cannot be read, is damaged or is no npz.
    """
    try:
        # numpy reads as much as an array's header says: with a smaller shape it never gets to the checksum.
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise ValueError(f"the checksum of {bad} is wrong")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except _DAMAGE as error:
        raise ValueError(str(error) or type(error).__name__) from None


def hash_files(paths: Mapping[str, Path]) -> str:
    """Hash names and contents, in the names' order, to ``sha256:…``."""
    digest = hashlib.sha256()
    for name in sorted(paths):
        digest.update(f"{name}\0{_hash_file(paths[name])}\0".encode())
    return f"sha256:{digest.hexdigest()}"


_hashes: dict[tuple[str, int, int], str] = {}


def _hash_file(path: Path) -> str:
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name  # the hub's cache names a large file by its sha256
    status = target.stat()
    key = (str(target), status.st_size, status.st_mtime_ns)
    if key not in _hashes:
        with open(target, "rb") as file:
            _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[key]

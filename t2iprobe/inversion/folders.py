"""A folder that a command writes and continues: OUT/settings.json is what every number in it depends on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2iprobe.errors import UserError
from t2iprobe.storage import explain_full_disk, remove_leftovers, write_atomically

NAME = "settings.json"


def check_folder(out: Path, identity: Mapping[str, Any], what: str, results: Sequence[str]) -> None:
    """Raise UserError where `out` is a file, or holds another `what` than that of `identity`.

    A folder in which none of `results` (names) lies yet may become any other.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give --out a folder")
    if not any((out / name).exists() for name in results):
        return
    path = out / NAME
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        differences = find_differences(stored, identity)
    except FileNotFoundError:
        raise UserError(f"{out} holds a {what} without its {NAME}: give --out another folder") from None
    except (ValueError, AttributeError):
        raise UserError(f"{path} is damaged: give --out another folder") from None
    if differences:
        raise UserError(f"{out} holds another {what} ({'; '.join(differences[:3])}): give another --out")


def claim_folder(out: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder, clear what killed writers left, and write `identity` into it.

    Raises UserError where that cannot be done.
    """
    try:
        with explain_full_disk(out):
            out.mkdir(parents=True, exist_ok=True)
            remove_leftovers(out)
            write_atomically(out / NAME, json.dumps(identity, indent=1).encode())
    except OSError as error:
        raise UserError(f"cannot write into {out} ({error.strerror}): give another --out") from None


def find_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return "key: old there, new now" for the leaves of two identities that differ."""
    flat_stored, flat_wanted = _flatten(stored), _flatten(wanted)
    return [
        f"{key}: {_short(flat_stored.get(key))} there, {_short(flat_wanted.get(key))} now"
        for key in flat_wanted | flat_stored
        if flat_stored.get(key) != flat_wanted.get(key)
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        leaves |= _flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return leaves


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"

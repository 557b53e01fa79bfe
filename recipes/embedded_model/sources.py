"""Free pictures with English names: Debian and npm packages, downloaded, unpacked, listed.

Only sets whose licence lets anybody use, change and pass them on (LICENCES). The `apple` and `facebook`
emoji sets that the
same npm packages' family carries are proprietary and are never read.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

# Where everything is kept between steps and continued from.
WORK = Path.home() / ".cache" / "t2iprobe" / "embedded_model"
DEBIAN = ("tuxpaint-stamps-default", "openclipart-png")
NPM = ("emoji-datasource-google@16.0.0", "emoji-datasource-twitter@16.0.0", "@lobehub/fluent-emoji-3d@1.1.0")
LICENCES = {
    "stamps": "GPL-2.0-or-later (Tux Paint stamps)",
    "openclipart": "public domain (Open Clip Art)",
    "noto": "Apache-2.0 (Noto emoji, pictures)",
    "twemoji": "CC-BY-4.0 (Twemoji, pictures)",
    "fluent": "MIT (Microsoft Fluent emoji)",
}


@dataclass(frozen=True)
class Source:
    """A picture and the English names that its set gives it, the most exact first; `file` names it inside
    its collection.
    """

    collection: str
    file: str
    path: Path
    names: tuple[str, ...]


def download(work: Path) -> None:
    """Fetch and unpack every package once below `work` (needs apt-get, dpkg and npm)."""
    for package in DEBIAN:
        if not (work / package / "done").exists():
            (work / package).mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", package], cwd=work / package, check=True)
            subprocess.run(["dpkg", "-x", next((work / package).glob("*.deb")), work / package], check=True)
            (work / package / "done").touch()
    for package in NPM:
        folder = work / re.sub(r"[@/]", "_", package.rsplit("@", 1)[0])
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
            with tarfile.open(next(folder.glob("*.tgz"))) as archive:
                archive.extractall(folder, filter="data")
            (folder / "done").touch()


def list_sources(work: Path) -> list[Source]:
    """Every usable picture below `work`, in a fixed order."""
    return _stamps(work / DEBIAN[0]) + _openclipart(work / DEBIAN[1]) + _emoji(work)


def _words(stem: str) -> str:
    """`Blue_Car02` → `blue car`."""
    split = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stem)
    return re.sub(r"[^a-z]+", " ", split.lower()).strip()


def _stamps(folder: Path) -> list[Source]:
    root = folder / "usr/share/tuxpaint/stamps"
    found = []
    for path in sorted(root.rglob("*.png")):
        if path.relative_to(root).parts[0] == "symbols":
            continue
        text = path.with_suffix(".txt")
        description = text.read_text("utf8", "replace").splitlines()[0] if text.exists() else ""
        found.append(
            Source("stamps", str(path.relative_to(root)), path, (_words(description), _words(path.stem)))
        )
    return found


def _openclipart(folder: Path) -> list[Source]:
    root = folder / "usr/share/openclipart"
    return [
        Source(
            "openclipart", str(path.relative_to(root)), path, (_words(path.stem), _words(path.parent.name))
        )
        for path in sorted(root.rglob("*.png"))
        if not re.search(r"flag|sign|letter|alphabet|computer/icons|map", str(path.relative_to(root)).lower())
    ]


def _emoji(work: Path) -> list[Source]:
    google, twitter, fluent = (work / re.sub(r"[@/]", "_", p.rsplit("@", 1)[0]) / "package" for p in NPM)
    found = []
    for row in json.loads((google / "emoji.json").read_text()):
        if row["category"] in ("Symbols", "Flags", "Smileys & Emotion", "People & Body"):
            continue
        names = tuple(dict.fromkeys(_words(n) for n in (row["name"], row["short_name"], *row["short_names"])))
        files = {
            "noto": google / "img/google/64" / row["image"],
            "twemoji": twitter / "img/twitter/64" / row["image"],
            "fluent": fluent / "assets" / row["image"].replace(".png", ".webp"),
        }
        found += [Source(name, path.name, path, names) for name, path in files.items() if path.exists()]
    return found

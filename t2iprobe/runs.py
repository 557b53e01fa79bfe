"""A run directory is the only state of a run: its manifest, its shards of logits, the pictures that are kept.

    RUN/manifest.json               what every number depends on, and the prompts
    RUN/shards/00000000.npz         indices int64 [n] (positions in the plan), skipped int64 [k] among them,
                                    logits/<classifier> float32 [n, C]; named by its first index
    RUN/pictures/<synset>/*.png     or RUN/thumbnails/<synset>/*.webp, as asked

What is done is the union of the shards' indices; nothing else is remembered, so a killed run continues.
"""

import fcntl
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t2iprobe.errors import UserError, suggest
from t2iprobe.plans import PlanEntry, build_plan, picture_seed, reconcile
from t2iprobe.storage import explain_full_disk, read_arrays, remove_leftovers, write_atomically

__all__ = ["SCHEMA", "WHOLE", "PlanEntry", "Run", "Share", "build_plan", "picture_seed"]

SCHEMA = "t2iprobe.run/1"
THUMBNAIL_SIDE = 128  # pixels
KEPT = {"all": ("pictures", "png"), "thumbnails": ("thumbnails", "webp")}

Share = tuple[int, int]  # (i, n): plan positions p with p % n == i
WHOLE: Share = (0, 1)


class Shard(NamedTuple):
    """Stored together: plan positions [n], those skipped, logits [n, C] by classifier, picture files."""

    indices: list[int]
    skipped: list[int]
    logits: dict[str, np.ndarray]
    files: dict[int, bytes]


class Run:
    """An open run directory. `create` makes or continues one, `open` reads one."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def create(cls, path: str | Path, manifest: dict[str, Any], *, extend: bool = False) -> "Run":
        """Make the directory, or continue the run that it holds.

        Raises UserError with the differences where the run there has another identity or plan; with `extend`
        a plan may grow (more samples, more synsets). A run that stored nothing yet may become any other.
        """
        path = Path(path)
        with explain_full_disk(path):
            _make_folders(path)
        with explain_full_disk(path), _lock(path / "locks" / "manifest", wait=True):
            if (path / "manifest.json").exists():
                stored = cls.open(path)
                if stored.shards or _is_locked(path / "locks"):
                    manifest = reconcile(stored.manifest, manifest, path, extend=extend)
                if manifest == stored.manifest:
                    return stored
            write_atomically(path / "manifest.json", _to_json(manifest))
        return cls(path, manifest)

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Read the manifest of a run directory. Raises UserError where there is none or it is damaged."""
        path = Path(path)
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            known = manifest["schema"] == SCHEMA and manifest["plan"] and manifest["identity"]
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path} is not a run directory: it has no manifest.json") from None
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise UserError(f"{path / 'manifest.json'} is damaged or of another version (wanted {SCHEMA})")
        return cls(path, manifest)

    @cached_property
    def plan(self) -> list[PlanEntry]:
        """Every picture of the run, in the order of drawing; a shard's indices are positions in it."""
        return build_plan(self.manifest["plan"], self.manifest["identity"].get("seed", 0))

    @property
    def classifiers(self) -> list[str]:
        """The names of the classifiers, the first one being the headline's."""
        return list(self.manifest["identity"]["classifiers"])

    @property
    def shards(self) -> list[Path]:
        """The shard files, sorted by name."""
        return sorted((self.path / "shards").glob("*.npz"))

    def done(self) -> set[int]:
        """Return the plan positions that are stored. Raises UserError naming a corrupt shard."""
        return {int(index) for shard in self.shards for index in self._read(shard)["indices"]}

    def missing(self, share: Share = WHOLE) -> list[int]:
        """Return the plan positions of `share` that are not stored yet."""
        done = self.done()
        return [p for p in range(len(self.plan)) if p % share[1] == share[0] and p not in done]

    @property
    def complete(self) -> bool:
        """Whether every picture of the plan is stored."""
        return not self.missing()

    @contextmanager
    def writing(self, share: Share = WHOLE) -> Iterator[None]:
        """Hold the right to write `share`, and clear what killed writers left.

        Raises UserError where another process writes it, or writes shares of another count.
        """
        locks = self.path / "locks"
        for path in locks.glob("*-of-*"):
            if path.name.split("-of-")[1] != str(share[1]):
                with _lock(path):
                    pass
        with _lock(locks / f"{share[0]}-of-{share[1]}"):
            for folder in (self.path, self.path / "shards"):
                remove_leftovers(folder)
            yield

    def write_shard(
        self,
        indices: Sequence[int],
        logits: Mapping[str, np.ndarray],
        pictures: Sequence[np.ndarray | None] | None = None,
    ) -> None:
        """Store the logits [n, C] of the pictures (uint8 [H, W, 3]) at the plan positions `indices` [n].

        A picture that is None was skipped: it is done, and its logits are left out of results.
        """
        kept = dict(zip(indices, pictures, strict=True)) if pictures is not None else {}
        keep = self.manifest["identity"]["keep"]
        files = {
            index: _encode_picture(picture, KEPT[keep][1])
            for index, picture in kept.items()
            if picture is not None and keep in KEPT
        }
        skipped = [index for index, picture in kept.items() if picture is None]
        self.store(Shard(list(indices), skipped, dict(logits), files))

    def store(self, shard: Shard) -> None:
        """Store a shard: its pictures' files first, so that what counts as done is whole."""
        arrays = {
            "indices": np.asarray(shard.indices, np.int64),
            "skipped": np.asarray(shard.skipped, np.int64),
        }
        arrays |= {f"logits/{name}": np.asarray(value, np.float32) for name, value in shard.logits.items()}
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        with explain_full_disk(self.path):
            for index, file in shard.files.items():
                path = self.picture_path(self.plan[index])
                assert path is not None
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file)
            write_atomically(self.path / "shards" / f"{min(shard.indices):08d}.npz", content.getvalue())

    def logits(self, classifier: str | None = None) -> dict[str, np.ndarray]:
        """Return synset → logits float32 [N, C] of one classifier (the first by default), in plan order."""
        by_synset: dict[str, list[np.ndarray]] = {}
        for index, row in self.logit_rows(classifier).items():
            by_synset.setdefault(self.plan[index].synset, []).append(row)
        return {synset: np.stack(by_synset[synset]) for synset in sorted(by_synset)}

    def logits_by_template(self, classifier: str | None = None) -> dict[str, dict[str, np.ndarray]]:
        """Return template → synset → logits float32 [N, C], as `logits`; templates in the plan's order."""
        found: dict[str, dict[str, list[np.ndarray]]] = {}
        for index, row in self.logit_rows(classifier).items():
            entry = self.plan[index]
            found.setdefault(entry.template, {}).setdefault(entry.synset, []).append(row)
        return {
            template: {synset: np.stack(rows[synset]) for synset in sorted(rows)}
            for template, rows in found.items()
        }

    def logit_rows(self, classifier: str | None = None) -> dict[int, np.ndarray]:
        """Return plan position → logits float32 [C] of what is stored and not skipped, in plan order."""
        name = classifier or self.classifiers[0]
        if name not in self.classifiers:
            raise UserError(f"the run has no classifier {name!r}{suggest(name, self.classifiers)}")
        rows: dict[int, np.ndarray] = {}
        for shard in self.shards:
            arrays = self._read(shard)
            skipped = set(arrays["skipped"].tolist())
            for index, row in zip(arrays["indices"].tolist(), arrays[f"logits/{name}"], strict=True):
                if index not in skipped:
                    rows[index] = row
        return {index: rows[index] for index in sorted(rows)}

    def pictures(self, synset: str) -> list[Path]:
        """Return the kept pictures or thumbnails of a synset that exist, in plan order."""
        entries = self._entries_by_synset.get(synset, [])
        return [path for entry in entries if (path := self.picture_path(entry)) and path.exists()]

    @cached_property
    def _entries_by_synset(self) -> dict[str, list[PlanEntry]]:
        entries: dict[str, list[PlanEntry]] = {}
        for entry in self.plan:
            entries.setdefault(entry.synset, []).append(entry)
        return entries

    def picture_path(self, entry: PlanEntry) -> Path | None:
        """Return where the picture of `entry` is kept, None where the run keeps none."""
        keep = self.manifest["identity"]["keep"]
        if keep not in KEPT:
            return None
        folder, ending = KEPT[keep]
        return self.path / folder / entry.synset.replace("/", "_") / f"{entry.name}.{ending}"

    def _read(self, shard: Path) -> dict[str, np.ndarray]:
        """Read a whole shard, so that its checksums are checked."""
        try:
            arrays = read_arrays(shard)
            if lacking := {"indices", "skipped"} - arrays.keys():
                raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
            sizes = {len(arrays[f"logits/{name}"]) for name in self.classifiers} | {len(arrays["indices"])}
            if len(sizes) != 1:
                raise ValueError("its arrays differ in length")
            if not all(0 <= index < len(self.plan) for index in arrays["indices"]):
                raise ValueError("it holds indices outside the plan")
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f"shard {shard} is corrupt ({error}): `t2iprobe hypernymy verify {self.path} --repair` "
                "sets it aside, then the run draws its pictures again"
            ) from None
        return arrays

    def verify(self, *, repair: bool = False) -> list[str]:
        """Return every problem of the stored shards and pictures.

        With `repair` a shard concerned becomes ``*.npz.corrupt``, and the next run draws its pictures again.
        """
        problems: list[str] = []
        seen: set[int] = set()
        for shard in self.shards:
            found = self._find_problems(shard, seen)
            problems += found
            if found and repair:
                shard.replace(shard.with_name(f"{shard.name}.corrupt"))
        return problems

    def _find_problems(self, shard: Path, seen: set[int]) -> list[str]:
        name = f"{shard.parent.name}/{shard.name}"
        try:
            arrays = self._read(shard)
        except UserError as error:
            return [f"{name}: {str(error).split(': `')[0].removeprefix(f'shard {shard} is ')}"]
        problems = []
        indices, skipped = set(arrays["indices"].tolist()), set(arrays["skipped"].tolist())
        if twice := indices & seen:
            problems.append(f"{name}: {len(twice)} pictures are in another shard too")
        seen |= indices
        for classifier in self.classifiers:
            if not np.isfinite(arrays[f"logits/{classifier}"]).all():
                problems.append(f"{name}: logits of {classifier} are not finite")
        for index in sorted(indices - skipped):
            path = self.picture_path(self.plan[index])
            if path is not None and not _is_picture(path):
                problems.append(f"{path.relative_to(self.path)}: missing or damaged")
        return problems


def _encode_picture(picture: np.ndarray, ending: str) -> bytes:
    from PIL import Image

    image, content = Image.fromarray(picture), io.BytesIO()
    if ending == "webp":
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image.save(content, "webp", quality=85, method=2)  # as small, a third faster than the default
    else:
        image.save(content, ending)
    return content.getvalue()


def _is_picture(path: Path) -> bool:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, UnidentifiedImageError):
        return False
    return True


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _make_folders(path: Path) -> None:
    try:
        for folder in (path / "locks", path / "shards"):
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path} cannot be a run directory: a file is in the way") from None
    except PermissionError:
        raise UserError(f"{path} cannot be written: give another folder with --out") from None


def _is_locked(folder: Path) -> bool:
    """Whether any process is writing a share."""
    try:
        for path in folder.glob("*-of-*"):
            with _lock(path):
                pass
    except UserError:
        return True
    return False


@contextmanager
def _lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"another process is writing {path.parent.parent} (share {path.name.replace('-of-', '/')}): "
                "wait for it, or stop it"
            ) from None
        yield

"""WordNet 3.0 from the package itself: synsets by name, wnid or lemma, read by nltk, never downloaded."""

import hashlib
import re
import warnings
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from t2iprobe.errors import UserError, suggest

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import Synset, WordNetCorpusReader

ARCHIVE = Path(__file__).parent / "assets" / "wordnet" / "wordnet.zip"
WORDNET_HASH = "sha256:e6d069e38dcae49a03351d6afe8db8429947093bd5642cee5985ccc0e0d0b299"

_WNID = re.compile(r"([nvasr])(\d{8})")
_SYNSET_NAME = re.compile(r"(.+)\.([nvasr])\.(\d{1,3})")
# Spelled with a vowel but spoken with a consonant first (unicycle, utensil), and the other way round (hour).
_SPOKEN_CONSONANT = re.compile(r"eu|ewe|uni(?![dmn])|u[bkst][aeiou]|on(?:e|ce)\b")
_SPOKEN_VOWEL = re.compile(r"[aeiou]|hour|heir|hono|hones|[fhlmnrsx]-")


def content_hash() -> str:
    """Hash the database files themselves (names and bytes, sorted), however they are compressed."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(ARCHIVE) as archive:
        for name in sorted(archive.namelist()):
            content = archive.read(name)
            digest.update(f"{Path(name).name}\0{len(content)}\0".encode())
            digest.update(content)
    return f"sha256:{digest.hexdigest()}"


@cache
def reader() -> "WordNetCorpusReader":
    """Open the packaged WordNet 3.0 as an nltk corpus reader (about two seconds, once a process)."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.data import ZipFilePathPointer

    class PackagedWordNet(WordNetCorpusReader):
        def map_wn(self, version: str = "wordnet") -> None:
            """Skip the map between WordNet versions: it needs a second, downloaded WordNet."""

    # nltk opens only what lies below one of its data folders.
    if str(ARCHIVE.parent) not in nltk.data.path:
        nltk.data.path.append(str(ARCHIVE.parent))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions")
        return PackagedWordNet(ZipFilePathPointer(str(ARCHIVE), "wordnet/"), None)


def synset(name: str) -> "Synset":
    """Return the synset called ``dog.n.01``, of wnid ``n02084071``, or the first noun sense of ``dog``.

    Raises UserError, with near names, where WordNet has none.
    """
    found = _find(name.strip())
    if found is None:
        raise UserError(f"WordNet has no synset {name.strip()!r}{_near(name.strip())}")
    return found


def wnid(synset: "Synset") -> str:
    """Return the part of speech and offset, the id that ImageNet uses: ``n02084071``."""
    return f"{synset.pos()}{synset.offset():08d}"


@dataclass(frozen=True, slots=True)
class TaggedSense:
    """A sense of a word that was met in WordNet's tagged texts, and how often; `sense` counts from 1."""

    lemma: str
    pos: str
    lexname: str
    sense: int
    count: int


@cache
def tagged_senses() -> tuple[TaggedSense, ...]:
    """Return every sense that was met, read at once: nltk's own `count` searches the file for each."""
    names, poses = _lexnames(), dict(zip("12345", "nvara", strict=True))
    found = []
    for line in _read_file("cntlist.rev").splitlines():
        key, sense, count = line.split()
        lemma, _, place = key.partition("%")
        pos, number = place.split(":")[:2]
        found.append(TaggedSense(lemma, poses[pos], names[number], int(sense), int(count)))
    return tuple(found)


def noun_glosses() -> list[tuple[str, str]]:
    """Return (lexicographer class, definition) of every noun synset, such as ("noun.animal", "…")."""
    names = _lexnames()
    found = []
    for line in _read_file("data.noun").splitlines():
        if not line.startswith("  "):  # the licence, which stands before the data
            columns, _, gloss = line.partition("|")
            found.append((names[columns.split(" ", 2)[1]], gloss.strip().partition('; "')[0]))
    return found


def _lexnames() -> dict[str, str]:
    rows = (line.split("\t") for line in _read_file("lexnames").splitlines())
    return {row[0]: row[1] for row in rows}


def _read_file(name: str) -> str:
    with zipfile.ZipFile(ARCHIVE) as archive:
        return archive.read(f"wordnet/{name}").decode("utf-8")


def choose_article(lemma: str) -> str:
    """Return "a" or "an", as `lemma` (lower case) is spoken."""
    vowel = _SPOKEN_VOWEL.match(lemma) and not _SPOKEN_CONSONANT.match(lemma)
    return "an" if vowel else "a"


def _find(name: str) -> "Synset | None":
    from nltk.corpus.reader.wordnet import WordNetError

    if match := _WNID.fullmatch(name):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No WordNet synset found")
            return reader().synset_from_pos_and_offset(match[1], int(match[2]))
    if match := _SYNSET_NAME.fullmatch(name):
        number = int(match[3])
        try:
            # nltk would read sense 0 as the last one
            return reader().synset(f"{match[1].lower()}.{match[2]}.{number:02d}") if number else None
        except WordNetError:
            return None
    lemma = name.replace(" ", "_").lower()
    senses = (reader().synsets(lemma, "n") or reader().synsets(lemma)) if lemma else []
    return senses[0] if senses else None


def _near(name: str) -> str:
    if _WNID.fullmatch(name):
        return "; a wnid is a letter and the eight digits of a WordNet 3.0 offset, such as n02084071"
    match = _SYNSET_NAME.fullmatch(name)
    lemma = (match[1] if match else name).replace(" ", "_").lower()
    if match and (senses := reader().synsets(lemma, "n")):
        return f"; {lemma} has {', '.join(sense.name() for sense in senses)}"
    similar = [word for word in reader().all_lemma_names("n") if abs(len(word) - len(lemma)) <= 2]
    if match:
        return suggest(f"{lemma}.n.01", (f"{word}.n.01" for word in similar))
    return suggest(lemma, similar)

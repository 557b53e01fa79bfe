"""Words for WordNet's concepts in other languages, from what is installed: nothing is downloaded.

Sources, each where it is there: Open Multilingual WordNet (nltk's data), the names that Unicode gives emoji
(package emoji), FreeDict's dictionaries (of dictd) and Apertium (translates an article and a noun).
"""

import gzip
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from t2iprobe.errors import UserError, suggest
from t2iprobe.languages import LANGUAGES, Gender, Word, check_language
from t2iprobe.wordnet import choose_article, reader, synset

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import Synset

DICTD = Path("/usr/share/dictd")
_OMW_CODES = {"de": "deu", "es": "spa", "fr": "fra"}
_DIGITS = {
    sign: value
    for value, sign in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
_GENDERS: Mapping[str, Gender] = {"masc": "m", "fem": "f", "neut": "n"}
# Which of FreeDict's labels fit which of WordNet's lexicographer files.
_LABELS = {
    "noun.animal": ("zool.", "ornith."), "noun.plant": ("bot.",), "noun.food": ("cook.", "agr."),
    "noun.artifact": ("techn.", "transp.", "mus.", "constr.", "textil.", "mil.", "arch."),
    "noun.body": ("anat.",), "noun.substance": ("chem.",), "noun.object": ("geogr.", "geol."),
}  # fmt: skip

_INFINITIVE = re.compile(r"(?:[aeiéí]r|re)(?:se)?$|^s[e']")

Found = dict[str, list[Word]]


def find_words(
    names: Sequence[str], language: str, sources: Sequence[str] | None = None
) -> dict[str, list[Word]]:
    """Return synset name → its words, the best first; synsets without a word are left out.

    Args:
        names: of synsets.
        language: one of `languages.LANGUAGES`.
        sources: of `SOURCES`, the first asked first; by default all that are installed.
    """
    check_language(language)
    synsets = {name: synset(name) for name in names}
    found: Found = {}
    for source in sources if sources is not None else [name for name in SOURCES if is_there(name, language)]:
        if source not in SOURCES:
            raise UserError(f"no source of words {source!r}{suggest(source, SOURCES)}")
        for name, words in SOURCES[source](synsets, language).items():
            found[name] = _merge(found.get(name, []), words)
    return {name: found[name] for name in names if found.get(name)}


def _merge(known: list[Word], more: Sequence[Word]) -> list[Word]:
    """Add words that are not known; a gender that only the later source tells is taken from there."""
    genders = {word.text.lower(): word.gender for word in more if word.gender}
    merged = [word if word.gender else replace(word, gender=genders.get(word.text.lower())) for word in known]
    there = {word.text.lower() for word in known}
    for word in more:
        if word.text.lower() not in there:
            there.add(word.text.lower())
            merged.append(word)
    return merged


def is_there(source: str, language: str) -> bool:
    """Tell whether a source is installed for a language."""
    if source == "omw":
        return _omw_folder() is not None
    if source == "emoji":
        import importlib.util

        return importlib.util.find_spec("emoji") is not None
    if source == "freedict":
        return _freedict_path(language).is_file()
    return bool(find_chain(language))


def _lemmas(concept: "Synset") -> list[str]:
    """Return the lemmas whose first sense is the concept, in WordNet's order."""
    lemmas = concept.lemma_names()
    own = [lemma for lemma in lemmas if reader().synsets(lemma, "n")[:1] == [concept]]
    return [lemma.replace("_", " ") for lemma in own]


def _from_omw(synsets: Mapping[str, "Synset"], language: str) -> Found:
    """Open Multilingual WordNet: human judgements, by WordNet 3.0's own offsets."""
    folder, code = _omw_folder(), _OMW_CODES[language]
    if folder is None:
        return {}
    by_offset = {f"{concept.offset():08d}-{concept.pos()}": name for name, concept in synsets.items()}
    found: Found = {}
    for path in sorted(folder.rglob(f"wn-data-{code}.tab")):
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = line.split("\t")
            if len(fields) >= 3 and fields[1].endswith("lemma") and fields[0] in by_offset:
                found.setdefault(by_offset[fields[0]], []).append(Word(fields[2].strip(), None, "omw"))
    return found


@cache
def _omw_folder() -> Path | None:
    import nltk

    for name in ("corpora/omw-1.4", "corpora/omw"):
        try:
            return Path(str(nltk.data.find(name)))
        except (LookupError, OSError):
            continue
    return None


def _from_emoji(synsets: Mapping[str, "Synset"], language: str) -> Found:
    """Unicode's names of emoji, where the English one is a lemma whose first sense is the concept."""
    names = _emoji_names(language)
    found: Found = {}
    for name, concept in synsets.items():
        words = [names[lemma.lower()] for lemma in _lemmas(concept) if lemma.lower() in names]
        if words:
            found[name] = [Word(_capitalize(word, language), None, "emoji") for word in dict.fromkeys(words)]
    return found


@cache
def _emoji_names(language: str) -> dict[str, str]:
    import emoji

    emoji.config.load_language(language)
    names: dict[str, str] = {}
    for entry in emoji.EMOJI_DATA.values():
        if language in entry:
            english, other = (str(entry[code]).strip(":").replace("_", " ") for code in ("en", language))
            names.setdefault(english.lower(), other)
    return names


def _capitalize(word: str, language: str) -> str:
    """German nouns begin with a capital, which emoji names have lost; the noun is the last word."""
    if language != "de":
        return word
    *others, noun = word.split(" ")
    return " ".join([*others, noun[:1].upper() + noun[1:]])


def _freedict_path(language: str) -> Path:
    return DICTD / f"freedict-eng-{LANGUAGES[language][0]}.index"


def _from_freedict(synsets: Mapping[str, "Synset"], language: str) -> Found:
    """FreeDict: a word for more than one of the lemmas first, then one whose label fits the concept.

    For a lemma that means something else first only an entry whose label fits will do.
    """
    wanted = {lemma.lower().replace("_", " ") for each in synsets.values() for lemma in each.lemma_names()}
    entries = _read_freedict(language, wanted)
    found: Found = {}
    for name, concept in synsets.items():
        votes: Counter[str] = Counter()
        first: dict[str, Word] = {}
        own = _lemmas(concept)
        for lemma in (each.replace("_", " ") for each in concept.lemma_names()):
            seen = set()
            verb = bool(reader().synsets(lemma.replace(" ", "_"), "v"))
            for place, (body, words) in enumerate(entries.get(lemma.lower(), [])):
                fits = any(f"[{label}]" in body for label in _LABELS.get(concept.lexname(), ()))
                if not fits and lemma not in own:
                    continue
                for rank, word in enumerate(words):
                    # What the word does as a verb is in the same entry.
                    if verb and not word.gender and _INFINITIVE.search(word.text):
                        continue
                    first.setdefault(word.text, word)
                    if word.text not in seen:
                        seen.add(word.text)
                        votes[word.text] += 1_000_000 + 10_000 * fits - 100 * min(place, 99) - min(rank, 99)
        if votes:
            found[name] = [first[text] for text, _ in votes.most_common(5)]
    return found


def _read_freedict(language: str, wanted: set[str]) -> dict[str, list[tuple[str, list[Word]]]]:
    """Return headword → its entries: the text of each and the nouns that it begins with."""
    heads, content = _open_freedict(_freedict_path(language))
    entries: dict[str, list[tuple[str, list[Word]]]] = {}
    for head in wanted & heads.keys():
        for place in heads[head]:
            start, length = (_read_number(number) for number in place.split("\t")[:2])
            body = content[start : start + length].decode("utf-8", "replace")
            entry = (body, list(_parse_entry(body, language)))
            known = entries.setdefault(head, [])
            if entry[1] and entry not in known:
                known.append(entry)
    return entries


@cache
def _open_freedict(index: Path) -> tuple[dict[str, list[str]], bytes]:
    """Return headword → places of its entries, and the file that these are in."""
    heads: dict[str, list[str]] = {}
    for line in index.read_text(encoding="utf-8").splitlines():
        head, _, place = line.partition("\t")
        heads.setdefault(head.lower(), []).append(place)
    return heads, gzip.decompress(index.with_suffix(".dict.dz").read_bytes())


def _read_number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + _DIGITS[digit]
    return value


def _parse_entry(body: str, language: str) -> Iterator[Word]:
    """Yield the nouns of an entry's first lines: ``Hund <masc> [zool.]``, ``2. poisson``."""
    lines = [line for line in body.splitlines()[1:] if not line.startswith("   ")]
    if language == "de":
        for line in lines:
            for text, kind in re.findall(r"([^,<>\[\]]+?)\s*<(masc|fem|neut)>", line):
                if (word := text.strip(" ;-")) and "(" not in word:
                    yield Word(word, _GENDERS[kind], "freedict")
        return
    for line in lines:
        for part in re.split(r"[,;]", re.sub(r"^\s*\d+\.\s*", "", line)):
            word = re.sub(r"\s*[<\[(].*$", "", part).strip()
            if word:
                yield Word(word, None, "freedict")


@cache
def list_modes() -> tuple[str, ...]:
    """Return Apertium's installed directions, such as eng-spa."""
    program = shutil.which("apertium")
    if program is None:
        return ()
    listed = subprocess.run([program, "-l"], capture_output=True, text=True, check=False)
    return tuple(line.strip() for line in listed.stdout.splitlines() if "-" in line)


@cache
def find_chain(language: str, start: str = "en") -> tuple[str, ...]:
    """Return the shortest chain of Apertium's directions from `start` to a language, empty without one."""
    names = {"en": {"en", "eng"}, **{code: {code, three} for code, (three, _) in LANGUAGES.items()}}

    def alike(one: str, other: str) -> bool:
        return one == other or any(one in each and other in each for each in names.values())

    modes = [mode for mode in list_modes() if re.fullmatch(r"[a-z]{2,3}-[a-z]{2,3}", mode)]
    chains: list[tuple[str, ...]] = [()]
    for _ in range(3):
        longer = []
        for chain in chains:
            here = chain[-1].split("-")[1] if chain else start
            for mode in modes:
                source, target = mode.split("-")
                if alike(source, here) and mode not in chain:
                    if alike(target, language):
                        return (*chain, mode)
                    longer.append((*chain, mode))
        chains = longer
    return ()


def run_apertium(texts: Sequence[str], chain: Sequence[str]) -> list[str]:
    """Translate texts, one a line each, through a chain of directions. Unknown words stay, with a star."""
    program = shutil.which("apertium")
    if program is None or not chain:
        raise UserError("Apertium is not installed for this language: apt-get install apertium-eng-spa …")
    # A mark that no language changes keeps texts apart: Apertium reads on over line feeds.
    lines = [" ".join(text.split()) for text in texts]
    for mode in chain:
        joined = "\n\n".join(line or "." for line in lines) + "\n\n"
        done = subprocess.run(
            [program, mode], input=joined, capture_output=True, text=True, check=False, encoding="utf-8"
        )
        if done.returncode:
            raise UserError(f"apertium {mode} failed: {done.stderr.strip()[:200]}")
        lines = [line.strip() for line in done.stdout.rstrip("\n").split("\n\n")]
        if len(lines) != len(texts):
            raise UserError(f"apertium {mode} gave {len(lines)} texts for {len(texts)}")
    return lines


def _from_apertium(synsets: Mapping[str, "Synset"], language: str) -> Found:
    """Apertium: an article and a noun, which also tells the gender, of each lemma."""
    asked = [(name, lemma) for name, concept in synsets.items() for lemma in _lemmas(concept)]
    texts = [f"{choose_article(lemma.lower())} {lemma}." for _, lemma in asked]
    there = run_apertium(texts, find_chain(language))
    back = run_apertium(there, find_chain("en", language)) if find_chain("en", language) else texts
    genders: Mapping[str, Gender] = {"un": "m", "une": "f", "una": "f", "uno": "m"}
    found: Found = {}
    for (name, lemma), text, again in zip(asked, there, back, strict=True):
        first, _, word = text.strip(" .").partition(" ")
        # Several words are taken for a sentence more often than not: they must come back as they were.
        kept = " " not in word or lemma.lower() in again.lower()
        if first.lower() in genders and word and kept and not re.search(r"[*@#]", word):
            known = found.get(name, [])
            found[name] = _merge(known, [Word(word, genders[first.lower()], "apertium")])
    return found


SOURCES: Mapping[str, Callable[[Mapping[str, "Synset"], str], Found]] = {
    "omw": _from_omw,
    "emoji": _from_emoji,
    "apertium": _from_apertium,
    "freedict": _from_freedict,
}


def describe_coverage(found: Mapping[str, Sequence[Word]], total: int) -> dict[str, object]:
    """Return how many synsets have a word, and from where."""
    sources = Counter(words[0].source for words in found.values())
    return {"synsets": total, "with_word": len(found), "sources": dict(sorted(sources.items()))}


def dump_words(found: Mapping[str, Sequence[Word]]) -> str:
    """Return words as JSON: what a run depends on."""
    return json.dumps({name: [[w.text, w.gender, w.source] for w in words] for name, words in found.items()})

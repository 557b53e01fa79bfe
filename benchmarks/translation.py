"""How near to people's translations, and as good to learn from? Captions and prose that people translated.

Both texts are in packages of Debian, and none of them is kept here. Captions: the stamps of Tux Paint, 952
pictures whose captions people wrote in many languages (tuxpaint-stamps-default, GPL-2). Prose: the stories,
units and help of Battle for Wesnoth (wesnoth-1.16-data and its campaigns, GPL-2 or later).

    apt-get download tuxpaint-stamps-default wesnoth-1.16-data \
        $(apt-cache depends wesnoth-1.16 | grep -oE 'wesnoth-1.16-[a-z]+' | grep -vE 'core|data|music')
    for file in *.deb; do dpkg-deb -x $file human; done
    python benchmarks/translation.py captions human/usr/share/tuxpaint/stamps --out runs/translation
    python benchmarks/translation.py prose human/usr/share/games/wesnoth/1.16/locale --out runs/translation

Captions are translated by each back end that is here, and compared with the person's by chrF. Prose trains
small Llamas, on English, on Apertium's translation of it and on the person's, judged on a person's prose.
"""

import argparse
import gettext
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2iprobe.errors import UserError
from t2iprobe.intervals import describe_mean
from t2iprobe.languages import LANGUAGES
from t2iprobe.lexicon import find_chain
from t2iprobe.llm.corpus.ablation import Training, tabulate
from t2iprobe.llm.corpus.arms import Plan, run_plan
from t2iprobe.llm.corpus.documents import Source, number_of
from t2iprobe.llm.translation import Translation, chrf, translate_file
from t2iprobe.llm.translators import make_translator
from t2iprobe.storage import read_lines
from t2iprobe.wordnet import reader

SHORTEST, LONGEST = 80, 2000  # characters of a passage
JUDGES = 10  # one passage in so many judges
COMPARED = 300  # passages whose translation is compared with the person's
_MARKUP = re.compile(r"<[^<>]*>|\[/?[a-z]+\]")

Pair = dict[str, str]  # language → text


def read_captions(folder: Path) -> list[Pair]:
    """Return the stamps' captions in every language, each English one once, without letters and coins."""
    found: dict[str, Pair] = {}
    for path in sorted(folder.rglob("*.txt")):
        if "symbols" in path.relative_to(folder).parts:
            continue
        english, *others = path.read_text(encoding="utf-8", errors="replace").splitlines()
        named = (re.fullmatch(r"(fr|es|de)\.utf8=(.+)", line.strip()) for line in others)
        pair = {"en": english.strip()} | {match[1]: match[2].strip() for match in named if match}
        if len(pair) == 1 + len(LANGUAGES):
            found.setdefault(pair["en"], pair)
    return list(found.values())


def make_row(pair: Pair, place: int) -> dict[str, str]:
    """Return a row to translate; a caption that is a noun of WordNet and its article names its synset."""
    row = {"id": f"stamp/{place}", "text": pair["en"]}
    if match := re.fullmatch(r"An? ([\w' -]+)\.", pair["en"]):
        if concepts := reader().synsets(match[1].lower().replace(" ", "_"), "n"):
            row |= {"synset": concepts[0].name(), "template": "empty"}
    return row


def translate_rows(
    rows: Sequence[Mapping[str, str]], backend: str, language: str, out: Path
) -> list[dict[str, Any]]:
    """Translate rows by the command's own stage; what is done is kept in `out`."""
    given = out / f"{backend}-{language}.in.jsonl"
    write_rows(given, rows)
    made = out / f"{backend}-{language}.jsonl"
    translation = Translation(make_translator(backend, None, "cpu", None), [language])
    translate_file(Source.open(given), made, translation)
    return [json.loads(line) for line in read_lines(made)]


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def compare(made: Sequence[str], human: Sequence[str]) -> dict[str, Any]:
    """Return the mean chrF with its interval, and how many are the person's word for word."""
    texts = [text[:1].upper() + text[1:] for text in made]
    same = sum(_plain(text) == _plain(other) for text, other in zip(texts, human, strict=True))
    scores = [chrf(text, other) for text, other in zip(texts, human, strict=True)]
    return {"texts": len(texts), "chrf": describe_mean(scores), "same": same / len(texts)}


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def compare_captions(folder: Path, out: Path, engine: int) -> dict[str, Any]:
    """Translate the captions by every back end that has a way, and compare: all, and those of one noun."""
    pairs = read_captions(folder)
    random.Random(0).shuffle(pairs)
    rows = [make_row(pair, place) for place, pair in enumerate(pairs)]
    found: dict[str, Any] = {}
    for language in LANGUAGES:
        human = [pair[language] for pair in pairs]
        tables: dict[str, Any] = {"left in English": compare([pair["en"] for pair in pairs], human)}
        found[language] = tables
        plain = [{key: row[key] for key in ("id", "text")} for row in rows]
        if find_chain(language):
            made = translate_rows(plain, "apertium", language, out)
            tables["apertium"] = compare([row["text"] for row in made], human)
        if engine:
            made = translate_rows(plain[:engine], "engine", language, out)
            tables["engine, SmolLM2-135M"] = compare([row["text"] for row in made], human[:engine])
        # By table only what has a concept with a word, and Apertium on the same captions.
        by_table = translate_rows(rows, "dictionary", language, out)
        places = [place for place, row in enumerate(by_table) if row["text"]]
        tables["one noun: known"] = [len(places), sum("synset" in row for row in rows)]
        chosen = [human[place] for place in places]
        tables["one noun: dictionary"] = compare([by_table[place]["text"] for place in places], chosen)
        if "apertium" in tables:
            again = [json.loads(line) for line in (out / f"apertium-{language}.jsonl").open()]
            tables["one noun: apertium"] = compare([again[place]["text"] for place in places], chosen)
        tables["one noun: left in English"] = compare([pairs[place]["en"] for place in places], chosen)
    return found


def tabulate_captions(found: Mapping[str, Any]) -> str:
    """Return the table of captions as Markdown."""
    lines = ["| language | back end | captions | chrF | the person's words |", "|---|---|---:|---:|---:|"]
    for language, tables in found.items():
        for name, row in tables.items():
            if isinstance(row, dict):
                lines.append(
                    f"| {language} | {name} | {row['texts']} | {_cell(row['chrf'])} | {row['same']:.0%} |"
                )
    return "\n".join(lines)


def _cell(mean: Mapping[str, Any]) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(mean["value"], *mean["interval"])


def read_prose(folder: Path, language: str) -> list[Pair]:
    """Return passages in English and a language out of gettext's catalogues, without markup."""
    found: dict[str, Pair] = {}
    for path in sorted((folder / language / "LC_MESSAGES").glob("wesnoth*.mo")):
        with open(path, "rb") as file:
            catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        for key, other in catalog.items():
            if not isinstance(key, str) or "$" in key:  # plurals; sentences that are put together
                continue
            english = re.sub(r"^[\w ,:/-]+\^", "", key.rpartition("\x04")[2])
            pair = {
                name: _MARKUP.sub("", text).strip() for name, text in (("en", english), (language, other))
            }
            if all(SHORTEST <= len(text) <= LONGEST for text in pair.values()) and english != other:
                found.setdefault(pair["en"], pair)
    return list(found.values())


def compare_mixes(
    folder: Path, language: str, out: Path, training: Training, seeds: int, show: Callable[[int, int], None]
) -> dict[str, Any]:
    """Train on English, translated and human prose, and judge on human prose that none of them has."""
    out.mkdir(parents=True, exist_ok=True)
    held: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in read_prose(folder, language):
        held[number_of(pair["en"]) % JUDGES == 0].append(pair)
    if not all(held):
        raise UserError(f"no prose in {language} in {folder}")
    train, judges = held
    human, english, judge = (out / f"{name}.jsonl" for name in (language, "en", "judge"))
    for path, pairs, name in ((human, train, language), (english, train, "en"), (judge, judges, language)):
        write_rows(path, [{"id": f"{number_of(pair['en']):016x}", "text": pair[name]} for pair in pairs])
    translated = out / f"{language}-mt.jsonl"
    if not translated.exists():
        translation = Translation(make_translator("apertium", None, "cpu", None), [language])
        translate_file(Source.open(english), translated, translation, show)
    made = [json.loads(line)["text"] for line in translated.open()][:COMPARED]
    names = {"en": english, f"{language}-mt": translated, language: human}
    mixes = ["en:1", f"en:1,{language}-mt:1", f"{language}-mt:1", f"en:1,{language}:1", f"{language}:1"]
    plan = Plan(None, [], [], [f"{name}={path}" for name, path in names.items()], mixes, judge)
    return {
        "passages": len(train),
        "judges": len(judges),
        "apertium": compare(made, [pair[language] for pair in train][:COMPARED]),
        **run_plan(plan, out / "runs", training, seeds, show),
    }


def main() -> None:
    """Do one of both and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", choices=("captions", "prose"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/translation"))
    parser.add_argument(
        "--engine", type=int, default=100, help="captions for the engine, which is slow; 0: none"
    )
    parser.add_argument("--language", default="es", help="of the prose")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--seeds", type=int, default=3)
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    if words.texts == "captions":
        found = compare_captions(words.folder, words.out, words.engine)
        print(tabulate_captions(found))
        for language, tables in found.items():
            print(f"{language}: {tables['one noun: known']} captions of one noun have a word")
    else:
        found = compare_mixes(
            words.folder,
            words.language,
            words.out / words.language,
            Training(tokens=words.tokens),
            words.seeds,
            lambda done, total: None,
        )
        print(f"{found['passages']} passages train, {found['judges']} judge")
        print(f"Apertium's chrF on {COMPARED} passages: {_cell(found['apertium']['chrf'])}")
        print(tabulate(found))
        print(found["warning"] or "perplexity and accuracy agree")
    (words.out / f"{words.texts}{'-' + words.language if words.texts == 'prose' else ''}.json").write_text(
        json.dumps(found, indent=1)
    )


if __name__ == "__main__":
    main()

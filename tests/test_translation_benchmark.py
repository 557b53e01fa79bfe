"""benchmarks/translation.py reads what people wrote, and compares it."""

import struct
from pathlib import Path
from types import ModuleType

import pytest
from benchmark_files import load_benchmark


@pytest.fixture(scope="module")
def translation() -> ModuleType:
    return load_benchmark("translation")


def test_captions_of_stamps(translation: ModuleType, tmp_path: Path) -> None:
    others = "de.utf8=Ein Dingo.\nes.utf8=Un dingo.\nfr.utf8=Un dingo. \nit.utf8=Un dingo.\n"
    for name, text in (
        ("animals/dingo.txt", f"A dingo.\n{others}"),
        ("animals/dingo2.txt", f"A dingo.\n{others.replace('Un', 'El')}"),
        ("animals/half.txt", "A fox.\nfr.utf8=Un renard.\n"),
        ("symbols/a.txt", f"The letter a.\n{others}"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    pairs = translation.read_captions(tmp_path)

    assert pairs == [{"en": "A dingo.", "de": "Ein Dingo.", "es": "Un dingo.", "fr": "Un dingo."}]
    row = translation.make_row(pairs[0], 3)
    assert row == {"id": "stamp/3", "text": "A dingo.", "synset": "dingo.n.01", "template": "empty"}
    assert "synset" not in translation.make_row({"en": "A dingo in the sun."}, 0)
    found = translation.compare(["un dingo", "Ein Fuchs."], ["Un dingo.", "Un dingo."])
    assert (found["texts"], found["same"]) == (2, 0.5)
    assert 40 < found["chrf"]["value"] < 60


def test_prose_of_catalogues(translation: ModuleType, tmp_path: Path) -> None:
    long = "The old dragon sleeps below the mountain, and nobody who went to wake it has ever come back home."
    other = (
        "El viejo dragón duerme bajo la montaña, y nadie de los que fueron a despertarlo volvió jamás a casa."
    )
    messages = {
        "": "Content-Type: text/plain; charset=UTF-8\n",
        "short": "corto",
        f"story^<i>{long}</i>": other,
        f"{long} $name": f"{other} $name",
        f"{long} {long}": f"{long} {long}",  # not translated
    }
    folder = tmp_path / "es" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    (folder / "wesnoth-x.mo").write_bytes(write_catalog(messages))

    assert translation.read_prose(tmp_path, "es") == [{"en": long, "es": other}]


def write_catalog(messages: dict[str, str]) -> bytes:
    """Return messages as gettext's binary catalogue."""
    texts = [text.encode() for pair in sorted(messages.items()) for text in pair]
    start, places = 28 + 16 * len(messages), []
    for text in texts:
        places.append((len(text), start))
        start += len(text) + 1
    table = [number for half in (places[::2], places[1::2]) for place in half for number in place]
    header = struct.pack("<7I", 0x950412DE, 0, len(messages), 28, 28 + 8 * len(messages), 0, 0)
    return header + struct.pack(f"<{len(table)}I", *table) + b"".join(text + b"\0" for text in texts)

"""Who translates from English: a model of Transformers, the engine by examples, Apertium, or tables.

All behind one Protocol: texts in, as many texts out, in order. None downloads anything but a model that is
asked for by its hub id.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from t2iprobe.errors import UserError, suggest
from t2iprobe.languages import LANGUAGES, check_language
from t2iprobe.lexicon import find_chain, run_apertium

# The examples of the engine's prompt, one English sentence in each language.
_EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "en": (
        "A photo of an old lighthouse by the sea.",
        "A woman is reading a book in the garden.",
        "An oil painting of two horses in the snow.",
    ),
    "fr": (
        "Une photo d'un vieux phare au bord de la mer.",
        "Une femme lit un livre dans le jardin.",
        "Une peinture à l'huile de deux chevaux dans la neige.",
    ),
    "de": (
        "Ein Foto von einem alten Leuchtturm am Meer.",
        "Eine Frau liest im Garten ein Buch.",
        "Ein Ölgemälde von zwei Pferden im Schnee.",
    ),
    "es": (
        "Una foto de un viejo faro junto al mar.",
        "Una mujer lee un libro en el jardín.",
        "Una pintura al óleo de dos caballos en la nieve.",
    ),
}
# NLLB writes its languages with their script; M2M and OPUS-MT use the plain codes.
_SCRIPTED = {code: f"{three}_Latn" for code, (three, _) in LANGUAGES.items()} | {"en": "eng_Latn"}

BACKENDS = ("apertium", "engine", "seq2seq", "dictionary")


class Translator(Protocol):
    """Translates texts from English, and back where it can."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the translations depend on, as JSON."""
        ...

    def translate(self, texts: Sequence[str], to: str) -> list[str]:
        """Return a translation of each text."""
        ...

    def back(self, texts: Sequence[str], language: str) -> list[str] | None:
        """Return texts of `language` in English, None where there is no way back."""
        ...


class Apertium:
    """The rules of Apertium, directly or by way of other languages; the same text each time."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Which pairs are installed."""
        return {"backend": "apertium", "chains": {code: find_chain(code) for code in LANGUAGES}}

    def translate(self, texts: Sequence[str], to: str) -> list[str]:
        """Return translations; a word that Apertium does not know has a star before it."""
        return run_apertium(texts, self.find_way("en", to))

    def back(self, texts: Sequence[str], language: str) -> list[str] | None:
        """Return texts in English."""
        chain = find_chain("en", language)
        return run_apertium([text.replace("*", "") for text in texts], chain) if chain else None

    def find_way(self, start: str, to: str) -> tuple[str, ...]:
        """Return the directions from one language to another. Raises UserError without any."""
        chain = find_chain(to, start)
        if not chain:
            raise UserError(
                f"no way from {start} to {to} with the pairs of Apertium that are installed: there may be "
                "packages for it (apertium-eng-spa, apertium-eng-cat and apertium-fra-cat, …)"
            )
        return chain


@dataclass
class Seq2Seq:
    """A translation model of Transformers: OPUS-MT, NLLB, M2M. {to} in its name stands for the language.

    model: a folder or hub id, such as Helsinki-NLP/opus-mt-en-{to} or facebook/nllb-200-distilled-600M.
    """

    model: str
    device: str = "cpu"
    batch: int = 16
    max_new_tokens: int = 256

    @property
    def settings(self) -> Mapping[str, Any]:
        """The model's name and, of a folder, its content."""
        from t2iprobe.storage import hash_files

        folder = Path(self.model)
        found: dict[str, Any] = {"backend": "seq2seq", "model": self.model, "most": self.max_new_tokens}
        if folder.is_dir():
            found["hash"] = hash_files({path.name: path for path in folder.iterdir() if path.is_file()})
        return found

    def translate(self, texts: Sequence[str], to: str) -> list[str]:
        """Return greedy translations, in batches of about the same length."""
        import torch

        model, tokenizer = self._load(to)
        options = self._target(tokenizer, model, to)
        prefix = f">>{to}<< " if f">>{to}<<" in tokenizer.get_vocab() else ""
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        found = [""] * len(texts)
        for start in range(0, len(order), self.batch):
            places = order[start : start + self.batch]
            given = tokenizer(
                [prefix + texts[place] for place in places],
                return_tensors="pt",
                padding=True,
                truncation=True,
            ).to(self.device)
            with torch.inference_mode():
                made = model.generate(
                    **given, num_beams=1, do_sample=False, max_new_tokens=self.max_new_tokens, **options
                )
            for place, text in zip(
                places, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True
            ):
                found[place] = text.strip()
        return found

    def back(self, texts: Sequence[str], language: str) -> list[str] | None:
        """Return None: most models have one direction."""
        return None

    @cached_property
    def _loaded(self) -> dict[str, tuple[Any, Any]]:
        return {}

    def _load(self, to: str) -> tuple[Any, Any]:
        name = self.model.replace("{to}", to)
        if name not in self._loaded:
            from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(name)
                model = AutoModelForSeq2SeqLM.from_pretrained(name, use_safetensors=None)
            except (OSError, ValueError, KeyError) as error:
                raise UserError(
                    f"cannot load the translation model {name}: {str(error).splitlines()[0]}"
                ) from None
            self._loaded[name] = (model.to(self.device).eval(), tokenizer)
        return self._loaded[name]

    def _target(self, tokenizer: Any, model: Any, to: str) -> dict[str, Any]:
        """Return what tells a model of many languages which one to write."""
        words = tokenizer.get_vocab()
        codes = (_SCRIPTED[to], f"__{to}__", f"{to}_XX")
        code = next((code for code in codes if code in words), None)
        if code is None:
            return {}
        english = {codes[0]: "eng_Latn", codes[1]: "en", codes[2]: "en_XX"}[code]
        tokenizer.src_lang = english
        return {"forced_bos_token_id": words[code]}


@dataclass
class EngineTranslator:
    """The engine's language model, shown three examples: CuatroLLM's way (arXiv 2410.23956)."""

    model: str = "smollm2"
    device: str = "cpu"
    memory: int | None = None
    max_new_tokens: int = 96

    @property
    def settings(self) -> Mapping[str, Any]:
        """The model's content."""
        from t2iprobe.llm.models import find_language_model

        files = find_language_model(self.model)
        return {"backend": "engine", "model": files.hash, "most": self.max_new_tokens}

    @cached_property
    def _engine(self) -> Any:
        from t2iprobe.llm.commands import load_engine

        return load_engine(self.model, "none", memory=self.memory, device=self.device)

    def translate(self, texts: Sequence[str], to: str) -> list[str]:
        """Return greedy continuations of the examples, each up to the end of its line."""
        return self._continue(texts, "en", to)

    def back(self, texts: Sequence[str], language: str) -> list[str] | None:
        """Return texts in English, by the same examples the other way round."""
        return self._continue(texts, language, "en")

    def _continue(self, texts: Sequence[str], start: str, to: str) -> list[str]:
        from t2iprobe.llm.commands import write_texts

        rows = [{"prompt": few_shot_prompt(text, start, to)} for text in texts]
        made = write_texts(
            self._engine, rows, max_new_tokens=self.max_new_tokens, stop=["\n"], raw=True, batch=8
        )
        return [each["text"].strip() for each in made]


def few_shot_prompt(text: str, start: str, to: str) -> str:
    """Return the examples from one language to another, and the text that is to be translated."""
    names = {code: name for code, (_, name) in LANGUAGES.items()} | {"en": "English"}
    shown = "".join(
        f"{names[start]}: {one}\n{names[to]}: {other}\n\n"
        for one, other in zip(_EXAMPLES[start], _EXAMPLES[to], strict=True)
    )
    return f"{shown}{names[start]}: {' '.join(text.split())}\n{names[to]}:"


class Tables:
    """No translator of sentences: the published templates with a concept's word (see `languages`)."""

    settings: Mapping[str, Any] = {"backend": "dictionary"}

    def translate(self, texts: Sequence[str], to: str) -> list[str]:
        """Return nothing for any text: what tables can write has a concept, and is written from that."""
        return ["" for _ in texts]

    def back(self, texts: Sequence[str], language: str) -> list[str] | None:
        """Return None."""
        return None


def make_translator(backend: str, model: str | None, device: str, memory: int | None) -> Translator:
    """Return a back end by its name. Raises UserError for another name, and a seq2seq without a model."""
    if backend == "apertium":
        return Apertium()
    if backend == "dictionary":
        return Tables()
    if backend == "engine":
        return EngineTranslator(model or "smollm2", device, memory)
    if backend == "seq2seq":
        if model is None:
            raise UserError("seq2seq needs --model: a folder or hub id, such as Helsinki-NLP/opus-mt-en-{to}")
        return Seq2Seq(model, device)
    raise UserError(f"no back end {backend!r}{suggest(backend, BACKENDS)}; there are {', '.join(BACKENDS)}")


def check_backend(translator: Translator, languages: Sequence[str]) -> None:
    """Raise UserError where a language is not known, or a back end has no way to it."""
    for language in languages:
        check_language(language)
        if isinstance(translator, Apertium):
            translator.find_way("en", language)


def clean_stars(text: str) -> tuple[str, int]:
    """Return Apertium's text without its marks of unknown words, and how many there were."""
    cleaned, count = re.subn(r"[*@#](?=\w)", "", text)
    return cleaned, count

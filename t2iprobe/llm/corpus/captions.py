"""Our own signals, for prompts and captions: what is named, whether it can be drawn, how much is ballast.

As spans: ``t2i_synset_mentions``, whose scores are noun offsets of WordNet 3.0 (2084071: wnid n02084071), and
``t2i_template_leakage``. As numbers of the document: the others.
"""

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus.nouns import Nouns
from t2iprobe.llm.corpus.signals import PRECISION, Signals

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Slots that a template was not filled in: {lemma}, {{name}}, ${x}, __color__, <concept>, [NAME], %s, %(x)s.
_LEAKAGE = re.compile(
    r"\$?\{+[\w.: -]{0,40}\}+|__\w{1,40}?__|<[a-z][\w-]{0,40}>|\[[A-Z][A-Z_ ]{1,40}\]|%\(\w+\)[sd]|%[sd]\b"
)
_TAG_END = re.compile(r"[,;|\n]+")
_WEIGHT = re.compile(r"^[(\[{\s]+|[:\d.]*[)\]}\s]+$|:[\d.]+$")

# What prompts add to please a model, without saying what is to be seen.
BOOSTERS = frozenset(
    (
        "masterpiece", "best quality", "high quality", "highest quality", "top quality",
        "amazing quality", "great quality", "worst quality", "highly detailed",
        "extremely detailed", "ultra detailed", "ultra-detailed", "intricate details",
        "insanely detailed", "super detailed", "hyper detailed", "hyperdetailed", "detailed",
        "intricate", "sharp focus", "sharp", "absurdres", "highres", "high res", "high resolution",
        "ultra high res", "uhd", "ultra hd", "hd", "4k", "8k", "16k", "32k", "4k uhd", "8k uhd",
        "8k resolution", "4k resolution", "trending on artstation", "artstation", "artstation hq",
        "featured on artstation", "trending on deviantart", "deviantart", "award winning",
        "award-winning", "professional", "stunning", "beautiful", "gorgeous", "amazing", "perfect",
        "best", "unreal engine", "unreal engine 5", "octane render", "ray tracing", "cinematic",
        "hyperrealistic", "ultra realistic", "ultra-realistic", "photorealistic", "wallpaper",
        "raw photo", "newest", "very aesthetic", "aesthetic",
    )
)  # fmt: skip


def compute_caption_signals(text: str, nouns: Nouns, tokens: int | None) -> Signals:
    """Return the signals of a prompt or caption, which has so many of CLIP's tokens (None: not counted)."""
    mentions = nouns.find(text)
    tags = split_tags(text)
    whole = len(text)
    share = round(sum(noun.physical for noun in mentions) / len(mentions), PRECISION) if mentions else None
    depictable = len({noun.offset for noun in mentions if noun.depictable})
    signals: Signals = {
        "t2i_synset_mentions": [[noun.start, noun.end, noun.offset] for noun in mentions],
        "t2i_concreteness": [[0, whole, share]],
        "t2i_depictable_nouns": [[0, whole, depictable]],
        "t2i_template_leakage": [[match.start(), match.end(), 1.0] for match in _LEAKAGE.finditer(text)],
        "t2i_tags": [[0, whole, len(tags)]],
        "t2i_frac_repeated_tags": [[0, whole, _share(len(tags) - len(set(tags)), len(tags))]],
        "t2i_frac_booster_tags": [[0, whole, _share(sum(map(BOOSTERS.__contains__, tags)), len(tags))]],
    }
    if tokens is not None:
        signals["t2i_clip_tokens"] = [[0, whole, tokens]]
    return signals


def split_tags(text: str) -> list[str]:
    """Return the parts between commas, semicolons, bars and line feeds, in lower case, without weights."""
    parts = (_WEIGHT.sub("", _WEIGHT.sub("", part.strip(" .").lower())) for part in _TAG_END.split(text))
    return [part for part in parts if part]


def _share(part: int, whole: int) -> float:
    return round(part / whole, PRECISION) if whole else 0.0


@functools.cache
def load_token_counter(name: str) -> "Tokenizer":
    """Load the tokenizer whose tokens are counted, start and end included.

    name: embedded (the packaged model's), clip (OpenAI's, of package open-clip-torch), or a folder with a
    tokenizer.json. Raises UserError where it is not there.
    """
    from tokenizers import Tokenizer

    if name == "clip":
        return _openai_tokenizer()
    packaged = Path(__file__).parents[2] / "assets" / "embedded_model"
    folder = packaged if name == "embedded" else Path(name)
    for file in (folder / "tokenizer" / "tokenizer.json", folder / "tokenizer.json"):
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer
    raise UserError(f"no tokenizer.json in {name}: give embedded, clip or a pipeline's folder")


def _openai_tokenizer() -> "Tokenizer":
    import gzip
    import importlib.util

    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        raise UserError("the tokenizer clip comes with open-clip-torch: pip install t2iprobe[clip]")
    from transformers import CLIPTokenizer

    lines = gzip.decompress((Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes())
    # The first line is a title; of the merges so many make CLIP's vocabulary of 49,408.
    merges: Any = [tuple(line.split()) for line in lines.decode().split("\n")[1 : 49152 - 256 - 2 + 1]]
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=merges)
    return tokenizer.backend_tokenizer


def _byte_letters() -> list[str]:
    """GPT-2's letters for bytes, in the order that CLIP numbers them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + place) for place in range(len(hidden))]

"""What 4 bits cost: the perplexity of real text with weights and cache in 4 bits, against float32.

    python benchmarks/throughput_perplexity.py [--work DIR] [--json FILE] [--texts 32] [--tokens 256]

Two kinds of text, read where they are installed: Python's own reference (`pydoc_data.topics`, PSF licence),
and WordNet's glosses of the nouns in ImageNet's hierarchy. Cut into texts of one length, they are read a few
rows at a time, so that all but the nearest keys and values come from the cache as it is held. Killed, the
same command continues.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from language_common import Kept, check_identity, describe_ratio, show, tell

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import pack_model
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.memory.packing import Packed, read_rest
from t2iprobe.llm.memory.placement import Placement, Shares
from t2iprobe.llm.memory.schedule import open_source, open_store
from t2iprobe.llm.memory.tiers import BatchCache
from t2iprobe.llm.models import (
    DEFAULT_MODEL,
    LanguageModelFiles,
    find_language_model,
    load_tokenizer,
    load_without_layers,
)
from t2iprobe.machine import list_versions
from t2iprobe.storage import write_atomically

ROWS = 16  # of a text in a pass
BATCH = 16
# Bits of weights and cache.
KINDS: dict[str, tuple[int | None, int | None]] = {
    "float32": (None, None),
    "weights in 4 bits": (4, None),
    "cache in 4 bits": (None, 4),
    "weights and cache in 4 bits": (4, 4),
}
HERE = Shares(1, 0, 0)


def read_reference() -> str:
    """Return Python's reference, in the order of its topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def read_glosses() -> str:
    """Return a line for each noun of ImageNet's hierarchy: what it is, and how it is used."""
    from t2iprobe.hypernymy.hierarchy import Hierarchy
    from t2iprobe.wordnet import synset

    lines = []
    for word in map(synset, Hierarchy.imagenet().all_synsets):
        uses = "".join(f" “{example}”" for example in word.examples())
        lines.append(f"{word.lemma_names()[0].replace('_', ' ')}: {word.definition()}.{uses}")
    return "\n".join(lines)


CORPORA = {"Python's reference": read_reference, "WordNet's glosses": read_glosses}


def cut(ids: Sequence[int], count: int, size: int) -> torch.Tensor:
    """Return `count` texts of `size` tokens, int64 [count, size], spread evenly over all."""
    step = (len(ids) - size) // max(1, count - 1)
    if step < size:
        raise UserError(f"{len(ids)} tokens are too few for {count} texts of {size}")
    return torch.tensor([ids[place * step : place * step + size] for place in range(count)])


def score_texts(decoder: Decoder, texts: torch.Tensor, bits: int | None, rows: int = ROWS) -> list[float]:
    """Return the negative log-likelihood of all but the first token of each text, in nats: [B].

    `texts` are int64 [B, T]; they are read `rows` at a time, with the cache held in `bits` bits.
    """
    count, size = texts.shape
    cache = BatchCache([0] * count, size, bits=bits, device=decoder.device)
    lost = torch.zeros(count, dtype=torch.float64)
    try:
        for begin in range(0, size - 1, rows):
            part = texts[:, begin : min(begin + rows, size - 1)]
            masks = {
                kind: cache.mask(part.shape[1], decoder.dtype, window)
                for kind, window in decoder.windows.items()
            }
            logits = decoder.run(part, cache.positions(part.shape[1]), masks, cache)
            coming = texts[:, begin + 1 : begin + 1 + part.shape[1], None]
            lost -= logits.log_softmax(-1).gather(2, coming)[:, :, 0].double().sum(1)
    finally:
        cache.close()
    return lost.tolist()


def score_kind(
    files: LanguageModelFiles, packed: Packed, kind: str, texts: torch.Tensor, dtype: str
) -> list[float]:
    """Return what each text loses with weights and cache held in such bits."""
    weight_bits, cache_bits = KINDS[kind]
    placement = Placement(1, 1, HERE, HERE, HERE, weight_bits=weight_bits, cache_bits=cache_bits)
    with ExitStack() as stack:
        store = stack.enter_context(open_store(placement, open_source(packed, weight_bits)))
        decoder = Decoder(load_without_layers(files, read_rest(packed), dtype=dtype), store)
        found = []
        for begin in range(0, len(texts), BATCH):
            found += score_texts(decoder, texts[begin : begin + BATCH], cache_bits)
    return found


def compare(kept: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """Return, of each corpus and kind, perplexity and its ratio to float32's, with intervals over texts."""
    rows = []
    for corpus in CORPORA:
        plain = kept[f"{corpus}/float32"]
        for kind in KINDS:
            lost = kept[f"{corpus}/{kind}"]
            table = [(own, other, tokens - 1) for own, other in zip(plain, lost, strict=True)]
            rows.append(
                {
                    "corpus": corpus,
                    "kind": kind,
                    "texts": len(lost),
                    "perplexity": describe_ratio(table, lambda _, other, count: _exp(other / count)),
                    "ratio": describe_ratio(table, lambda own, other, count: _exp((other - own) / count)),
                }
            )
    return rows


def _exp(values: Any) -> Any:
    return math.e**values


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Score what is not known yet, and compare."""
    files = find_language_model(options.model)
    check_identity(
        options.work,
        {"model": files.hash, "settings": [options.texts, options.tokens, options.dtype, sys.version]},
    )
    kept = Kept(options.work / "losses.json")
    packed, tokenizer = pack_model(files, options.dtype), load_tokenizer(files)
    for corpus, read in CORPORA.items():
        missing = [kind for kind in KINDS if f"{corpus}/{kind}" not in kept]
        if missing:
            enough = read()[: 40 * options.texts * options.tokens]
            ids = tokenizer(enough, verbose=False).input_ids
            texts = cut(ids, options.texts, options.tokens)
        for kind in missing:
            tell(f"{corpus}: {kind}")
            kept.put(f"{corpus}/{kind}", score_kind(files, packed, kind, texts, options.dtype))
    return {"rows": compare(kept, options.tokens), "tokens": options.tokens, "versions": list_versions()}


def table(report: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = ["| text | weights and cache | perplexity | times that of float32 |", "|---|---|---|---|"]
    for row in report["rows"]:
        lines.append(
            f"| {row['corpus']}, {row['texts']} × {report['tokens']} tokens | {row['kind']} "
            f"| {show(row['perplexity'])} | {show(row['ratio'], '.3f')} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/throughput_perplexity"))
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--texts", type=int, default=32, help="of each kind")
    parser.add_argument("--tokens", type=int, default=256, help="of each text")
    options = parser.parse_args(arguments)
    found = benchmark(options)
    if options.json:
        write_atomically(options.json, json.dumps(found, indent=1, default=float).encode())
    print(table(found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"throughput_perplexity.py: {error}", file=sys.stderr)
        sys.exit(2)

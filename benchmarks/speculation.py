"""How many tokens a pass of the target yields: trees, chains, Transformers' assisted generation, one run.

    python benchmarks/speculation.py [--work DIR] [--json FILE] [--drafts student,early-exit:8,lookup,copy:4]
    python benchmarks/speculation.py --show        # the table of what has been measured so far

The target first writes its own text after every prompt: greedy, plain decoding by Transformers. What each
pass of the target would yield with a draft follows from that text alone, since greedy verification accepts
what the target writes and nothing else. So most cells are *replayed*: the engine's own `generate` runs with a
target that reads the known text instead of computing it. Where the draft's guesses depend on the text only
(chains and optimal trees), they too are computed once, by teacher forcing. The cells of the first draft at
the judged budget, and everything of Transformers, are *written*: real passes, whose texts must be the
target's own; and where both were done, both must count the same passes.

Best-first trees of other drafts and budgets than those judged, and written chains and optimal trees, are only
grown on the first `--few` prompts of each task. Killed, the same command continues; it may name further
drafts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from language_common import (
    OTHER_TASKS,
    PROMPTS,
    TIE,
    Guesses,
    Kept,
    Text,
    acceptance_vector,
    check_identity,
    choose_rows,
    compare_texts,
    count_passes,
    decode,
    describe_ratio,
    identify_draft,
    is_recorded,
    judge_least,
    judge_texts,
    list_verdicts,
    record_guesses,
    show,
    tell,
    write_texts_plainly,
)
from torch import Tensor

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import Engine, known_acceptance, load_engine, make_draft
from t2iprobe.llm.engine.cache import RowCache
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.engine.drafts import Draft, ModelDraft, Request
from t2iprobe.llm.engine.generation import Generated, Trees, generate
from t2iprobe.llm.engine.processing import Processing
from t2iprobe.llm.engine.tree import DraftTree
from t2iprobe.machine import list_versions
from t2iprobe.storage import hash_files, write_atomically

GROWTHS = ("best-first", "optimal", "chain")
BUDGETS = (8, 16, 32, 64, 128, 256)
DRAFTS = ("student", "early-exit:8", "lookup", "copy:4")
JUDGED = 64
FEW_BUDGETS = (8, JUDGED)  # of the best-first trees of other models, each pass of which takes long
LOOKUP_TOKENS = 10  # of Transformers' prompt lookup, its own example's
PER = 256  # tokens that passes are counted for


# -- the known text in the target's place --------------------------------------------------------------


class KnownTarget:
    """A target that knows what it writes: it answers for nodes on its text, and only these are asked about.

    It stands in for a `Decoder`.
    """

    device = torch.device("cpu")

    def __init__(self, target: Decoder, text: Text) -> None:
        self.vocabulary, self.context_length = target.vocabulary, target.context_length
        self._ids = text.ids

    def new_cache(self, batch: int, capacity: int) -> RowCache:
        """Return a cache that stays without keys and values."""
        return RowCache(batch, capacity)

    def forward(
        self, tokens: Tensor, positions: Tensor, tree_mask: Tensor, cache: RowCache, keep: int
    ) -> Tensor:
        """Return logits [1, keep, V]: 1 for the text's next token, behind a node whose path is the text."""
        last = len(self._ids) - 1
        cache.reserve(positions)
        cache.advance(tokens.shape[1])
        right = (positions <= last) & (tokens == self._ids[positions.clamp(max=last)])
        on_text = (right[:, None, :] | ~tree_mask).all(-1) & (positions < last)
        logits = torch.zeros(1, keep, self.vocabulary)
        nodes = on_text[0, -keep:].nonzero()[:, 0]
        logits[0, nodes, self._ids[positions[0, -keep:][nodes] + 1]] = 1.0
        return logits


class KnownDraft:
    """A draft whose guesses along the target's text were recorded; off the text it has none.

    For trees whose shape does not depend on what is guessed off the text: chains and optimal ones.
    """

    knows_all = True

    def __init__(self, guesses: Guesses, text: Text, vocabulary: int) -> None:
        self._guesses, self._text, self.vocabulary = guesses, text, vocabulary
        self.passes = 0

    def begin(self, texts: Sequence[Tensor]) -> None:
        """Start anew with the prompt."""
        self._length = len(texts[0]) if texts else 0

    def expand(self, requests: Sequence[Request], processing: Processing) -> list[Tensor]:
        """Return the recorded log q behind nodes on the text, -inf behind all others."""
        (request,) = requests
        return [torch.stack([self._log_q(request.tree.path(int(node)).tolist()) for node in request.nodes])]

    def _log_q(self, path: list[int]) -> Tensor:
        log_q = torch.full((self.vocabulary,), -torch.inf, dtype=torch.float64)
        made = self._length - len(self._text.prompt)
        place = made + len(path)
        if path == self._text.tokens[made:place] and place < len(self._text.tokens):
            log_q[self._guesses.tokens[place]] = self._guesses.log_q[place]
        return log_q

    def accept(self, row: int, tree: DraftTree, path: Sequence[int], token: int) -> None:
        """Go on behind what was accepted."""
        self._length += len(path) + 1

    def settle(self) -> None:
        """Nothing to forget."""

    def select(self, rows: Sequence[int]) -> None:
        """There is one text."""


# -- arms ----------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The target, its texts, and the drafts, made when they are needed."""

    engine: Engine
    texts: Sequence[Text]
    most: int
    eos: Sequence[int]
    acceptance: Kept
    _drafts: dict[str, Draft | None] = field(default_factory=dict)
    _guesses: dict[tuple[str, int], Guesses] = field(default_factory=dict)

    def draft(self, name: str) -> Draft:
        """Return the draft of that name."""
        if name not in self._drafts:
            self._drafts[name] = make_draft(name, self.engine)
        draft = self._drafts[name]
        assert draft is not None
        return draft

    def guesses(self, name: str, place: int) -> Guesses:
        """Return what a draft guesses along a text."""
        if (name, place) not in self._guesses:
            self._guesses[name, place] = record_guesses(self.draft(name), self.texts[place])
        return self._guesses[name, place]

    def replay(self, name: str, growth: str, budget: int, place: int) -> dict[str, Any]:
        """Count the passes over a known text."""
        text, draft = self.texts[place], self.draft(name)
        if growth != "best-first" and is_recorded(draft):
            draft = KnownDraft(self.guesses(name, place), text, self.engine.target.vocabulary)
        target: Any = KnownTarget(self.engine.target, text)
        made = self._generate(target, draft, name, growth, budget, text)
        if made.token_ids != text.tokens:
            raise RuntimeError("a replayed text is not the known one")
        return describe(made)

    def write(self, name: str, growth: str, budget: int, place: int) -> dict[str, Any]:
        """Write a text with real passes of the target."""
        text = self.texts[place]
        made = self._generate(self.engine.target, self.draft(name), name, growth, budget, text)
        return describe(made) | {"differs": compare_texts(text, made.token_ids)}

    def _generate(
        self, target: Decoder, draft: Draft, name: str, growth: str, budget: int, text: Text
    ) -> Generated:
        trees = Trees(growth, budget, acceptance=known_acceptance(name))
        (made,) = generate(
            target, draft, [text.begin], trees=trees, max_new_tokens=self.most, eos_token_ids=self.eos
        )
        return made

    def assist(self, name: str, tokens: int | None, place: int) -> dict[str, Any]:
        """Write a text by Transformers' assisted generation: so many guesses a round, None: as it does."""
        draft = self.draft(name)
        assert isinstance(draft, ModelDraft)
        model = draft.decoder.model
        settings = model.generation_config
        settings.num_assistant_tokens = tokens
        settings.num_assistant_tokens_schedule = None if tokens is None else "constant"
        settings.assistant_confidence_threshold = None if tokens is None else 0.0
        return self._transformers(place, model, assistant_model=model)

    def look_up(self, tokens: int, place: int) -> dict[str, Any]:
        """Write a text with Transformers' prompt lookup."""
        return self._transformers(place, prompt_lookup_num_tokens=tokens)

    def _transformers(self, place: int, *drafts: Any, **more: Any) -> dict[str, Any]:
        text, model = self.texts[place], self.engine.target.model
        began = time.perf_counter()
        with count_passes(model, *drafts) as counts:
            made = decode(model, text.begin, self.most, self.eos, **more)
        tokens = made.sequences[0, len(text.prompt) :].tolist()
        return {
            "tokens": len(tokens),
            "target_passes": counts[0],
            "draft_passes": sum(counts[1:]),
            "seconds": time.perf_counter() - began,
            "differs": compare_texts(text, tokens),
        }


def describe(made: Generated) -> dict[str, Any]:
    """Return what is kept of a text."""
    return {
        "tokens": len(made.token_ids),
        "target_passes": made.target_passes,
        "draft_passes": made.draft_passes,
        "seconds": made.seconds,
    }


@dataclass(frozen=True)
class Arm:
    """A way to write, and how; `few`: on the first prompts of each task only."""

    name: str
    run: Callable[[int], dict[str, Any]]
    few: bool = False

    @property
    def file(self) -> str:
        """Where its results are kept."""
        return f"{self.name.replace('/', '_').replace(':', '-')}.json"


def plan_arms(bench: Bench, options: argparse.Namespace) -> list[Arm]:
    """Return all arms, what is judged first."""
    first, *others = options.drafts

    def replay(name: str, growth: str, budget: int, few: bool = False) -> Arm:
        run = partial(bench.replay, name, growth, budget)
        return Arm(f"replayed/{name}/{growth}/{budget}", run, few)

    arms = [replay(first, growth, JUDGED) for growth in GROWTHS]
    arms += [
        Arm(
            f"written/{first}/{growth}/{JUDGED}",
            partial(bench.write, first, growth, JUDGED),
            few=growth != "best-first",
        )
        for growth in GROWTHS
    ]
    if first != "lookup":
        counts = [None, *options.assistant_tokens]
        arms += [
            Arm(f"assisted/{first}/{count or 'default'}", partial(bench.assist, first, count))
            for count in counts
        ]
    arms.append(Arm(f"prompt lookup/{LOOKUP_TOKENS}", partial(bench.look_up, LOOKUP_TOKENS)))
    cells = [(g, b) for g in ("chain", "optimal", "best-first") for b in options.budgets]
    arms += [
        replay(first, growth, budget, growth == "best-first" and first != "lookup")
        for growth, budget in cells
        if budget != JUDGED
    ]
    for name in others:
        for growth, budget in cells:
            takes_long = growth == "best-first" and name != "lookup"
            if not takes_long or budget in FEW_BUDGETS:
                arms.append(replay(name, growth, budget, takes_long))
    return arms


def run_arms(bench: Bench, arms: Sequence[Arm], options: argparse.Namespace) -> dict[str, dict[int, Any]]:
    """Run every arm on its prompts, or with --show none. Returns what is known: arm → prompt → result."""
    found: dict[str, dict[int, Any]] = {}
    for number, arm in enumerate(arms, 1):
        kept = Kept(options.work / "arms" / arm.file)
        places = [i for i, text in enumerate(bench.texts) if not arm.few or text.number < options.few]
        for place in places:
            if str(place) not in kept and not options.show:
                tell(f"{arm.name} ({number} of {len(arms)}), prompt {place + 1} of {len(bench.texts)}")
                kept.put(str(place), arm.run(place))
        if kept:
            found[arm.name] = {int(place): result for place, result in kept.items()}
    return found


def measure_acceptance(bench: Bench, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the acceptance vector of each draft on prompt writing and on the other tasks."""
    for name in options.drafts:
        if name in bench.acceptance or options.show:
            continue
        tell(f"how often {name} is right")
        groups: dict[str, list[Tensor]] = {"prompt writing": [], "other": []}
        for place, text in enumerate(bench.texts):
            ranks = bench.guesses(name, place).ranks(text)
            groups["other" if text.task in OTHER_TASKS else "prompt writing"].append(ranks)
        vectors = {group: acceptance_vector(ranks) for group, ranks in groups.items() if ranks}
        bench.acceptance.put(name, vectors)
    return dict(bench.acceptance)


# -- what came of it -----------------------------------------------------------------------------------


def yield_of(results: Mapping[int, Mapping[str, Any]], places: Sequence[int]) -> list[list[float]]:
    """Return tokens and passes of each prompt, [N, 2]."""
    return [[results[place]["tokens"], results[place]["target_passes"]] for place in places]


def compare(found: Mapping[str, Mapping[int, Any]], texts: Sequence[Text]) -> dict[str, dict[str, Any]]:
    """Return for each arm its tokens a pass on prompt writing and on the other tasks."""
    rows: dict[str, dict[str, Any]] = {}
    for name, results in found.items():
        groups = {
            "prompt writing": [place for place in results if texts[place].task not in OTHER_TASKS],
            "other": [place for place in results if texts[place].task in OTHER_TASKS],
        }
        rows[name] = {}
        for group, places in groups.items():
            if places:
                rate = describe_ratio(yield_of(results, places), np.divide)
                tokens, passes = np.sum(yield_of(results, places), 0)
                rows[name][group] = {
                    "prompts": len(places),
                    "tokens": int(tokens),
                    "target_passes": int(passes),
                    "draft_passes": sum(results[place]["draft_passes"] for place in places),
                    "seconds": sum(results[place]["seconds"] for place in places),
                    "tokens_per_pass": rate,
                    "passes_per_256_tokens": PER / rate["value"],
                }
    return rows


def judge(
    found: Mapping[str, Mapping[int, Any]], texts: Sequence[Text], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the verdicts that what was found allows; trees and what they are compared with on one set."""
    first, bound = options.drafts[0], next((n for n in options.drafts if n.startswith("copy")), None)
    written = [result for results in found.values() for result in results.values() if "differs" in result]
    verdicts = [
        judge_texts([each["differs"] for each in written], "every text really written is the target's own")
    ]
    pairs = [
        (found[name.replace("written", "replayed", 1)].get(place), result)
        for name, results in found.items()
        if name.startswith("written/") and name.replace("written", "replayed", 1) in found
        for place, result in results.items()
        if result["differs"] is None
    ]
    passes = [(r["target_passes"], w["target_passes"]) for r, w in pairs if r is not None]
    if passes:
        equal, sums = sum(r == w for r, w in passes), np.sum(passes, 0)
        verdicts.append(
            {
                "claim": "replays count the passes that were really made, to 1 %",
                "holds": bool(abs(sums[0] - sums[1]) <= 0.01 * sums[1]),
                "detail": f"{equal} of {len(passes)} texts equal, {sums[0]} and {sums[1]} passes in all",
            }
        )
    chain = f"replayed/{first}/chain/{JUDGED}"
    rivals = [name for name in found if name.startswith(f"assisted/{first}/")]
    for growth in GROWTHS[:2]:
        name = f"replayed/{first}/{growth}/{JUDGED}"
        if name not in found:
            continue
        rate = describe_ratio(yield_of(found[name], _writing(texts, found[name])), np.divide)
        beside = _describe_bound(found, texts, bound, growth, first)
        what = f"{first}, {growth} trees of {JUDGED}"
        verdicts.append(judge_least(f"{what}: at least 3 tokens a pass of the target", rate, 3.0, beside))
        if chain in found:
            gain = describe_gain(found[name], found[chain], texts)
            verdicts.append(judge_least(f"{what}: at least 1.3 times the chain of {JUDGED}", gain, 1.3))
        for rival in rivals:
            gain = describe_gain(found[name], found[rival], texts)
            claim = f"{what}: more tokens a pass than Transformers' {rival}"
            verdicts.append(judge_least(claim, gain, 1.0, " times") | {"holds": gain["value"] > 1})
    return verdicts


def _writing(texts: Sequence[Text], *results: Mapping[int, Any]) -> list[int]:
    """Return the prompt-writing prompts that all have."""
    common = set.intersection(*(set(each) for each in results))
    return sorted(place for place in common if texts[place].task not in OTHER_TASKS)


def describe_gain(
    ours: Mapping[int, Any], theirs: Mapping[int, Any], texts: Sequence[Text]
) -> dict[str, Any]:
    """Return the ratio of tokens a pass on the prompt-writing prompts that both have, paired."""
    places = _writing(texts, ours, theirs)
    columns = np.hstack([yield_of(ours, places), yield_of(theirs, places)])
    return describe_ratio(columns.tolist(), lambda a, b, c, d: (a / b) / (c / d))


def _describe_bound(
    found: Mapping[str, Mapping[int, Any]], texts: Sequence[Text], bound: str | None, growth: str, first: str
) -> str:
    """Return what the upper bound yields on the prompts that it has, beside the first draft there."""
    above, own = f"replayed/{bound}/{growth}/{JUDGED}", f"replayed/{first}/{growth}/{JUDGED}"
    if above not in found or not (places := _writing(texts, found[above], found[own])):
        return ""
    rates = [np.divide(*np.sum(yield_of(found[name], places), 0)) for name in (above, own)]
    return f"; upper bound {bound}: {rates[0]:.2f}, where this is {rates[1]:.2f}"


def table(report: Mapping[str, Any]) -> str:
    """Return the Markdown tables, the verdicts and the notes."""
    rows, budgets = report["arms"], report["budgets"]
    lines = [
        f"Tokens a pass of the target (passes for {PER} tokens; on how many prompts), prompt writing, by "
        "guesses in a tree:",
        "",
        f"| draft | tree | {' | '.join(map(str, budgets))} |",
        f"|---|---|{'---|' * len(budgets)}",
    ]
    for draft in report["drafts"]:
        for growth in GROWTHS:
            cells = [rows.get(f"replayed/{draft}/{growth}/{b}", {}).get("prompt writing") for b in budgets]
            if any(cells):
                lines.append(f"| {draft} | {growth} | {' | '.join(map(_show_cell, cells))} |")
    lines += [
        "",
        "| really written | prompts | tokens a pass | passes for 256 | draft passes a pass | other tasks |",
        "|---|---|---|---|---|---|",
    ]
    for name, groups in rows.items():
        if name.startswith("replayed") or "prompt writing" not in groups:
            continue
        row = groups["prompt writing"]
        other = show(groups["other"]["tokens_per_pass"]) if "other" in groups else "–"
        lines.append(
            f"| {name} | {row['prompts']} | {show(row['tokens_per_pass'])} "
            f"| {row['passes_per_256_tokens']:.0f} | {row['draft_passes'] / row['target_passes']:.1f} "
            f"| {other} |"
        )
    lines += ["", *_table_acceptance(report["acceptance"]), "", *list_verdicts(report["verdicts"])]
    return "\n".join([*lines, "", *report["notes"]])


def _show_cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    rate, passes = cell["tokens_per_pass"]["value"], cell["passes_per_256_tokens"]
    return f"{rate:.2f} ({passes:.0f}; {cell['prompts']})"


def _table_acceptance(acceptance: Mapping[str, Mapping[str, Sequence[float]]], width: int = 8) -> list[str]:
    """Return the acceptance vectors: how often each rank of the draft is what the target writes."""
    lines = [
        f"| acceptance | text | {' | '.join(f'p{rank + 1}' for rank in range(width))} | sum |",
        f"|---|---|{'---|' * (width + 1)}",
    ]
    for draft, groups in acceptance.items():
        for group, vector in groups.items():
            cells = " | ".join(f"{share:.3f}" for share in vector[:width])
            lines.append(f"| {draft} | {group} | {cells} | {sum(vector):.3f} |")
    return lines


def write_notes(bench: Bench, options: argparse.Namespace) -> list[str]:
    """Return what a reader of the table must know."""
    tokens = sum(len(text.tokens) for text in bench.texts)
    written = sum(text.task not in OTHER_TASKS for text in bench.texts)
    ties = sum(gap < TIE for text in bench.texts for gap in text.gaps)
    target = bench.engine.target
    counts = " and ".join(str(count) for count in options.assistant_tokens)
    learns = "installed" if importlib.util.find_spec("sklearn") else "not installed, so it stays at .4"
    return [
        f"Target {options.model}, {target.dtype}, {target.device}, {torch.get_num_threads()} threads. "
        f"{len(bench.texts)} prompts ({written} of prompt writing), {tokens} tokens, {options.tokens} a text "
        f"at most; at {ties} of them the two best logits are less than {TIE:g} apart. Greedy everywhere. "
        "Intervals are over prompts. The pass that reads the prompt counts, for all.",
        "",
        f"Assisted generation: {counts} guesses a round without threshold, and Transformers' default (20 at "
        "most, ended by a guess of probability under .4; the threshold adapts only with scikit-learn, which "
        f"is {learns}). A chain of equal length yields as much as the constant; a longer constant yields no "
        f"more than the chain of that length. Prompt lookup: {LOOKUP_TOKENS} tokens. "
        "A sum below 1 in the acceptance table is what the first 16 guesses miss.",
    ]


def make_bench(options: argparse.Namespace, engine: Engine) -> Bench:
    """Return the bench with the target's texts written."""
    identity = {
        "model": engine.files.hash,
        "drafts": {name: identify_draft(name) for name in options.drafts},
        "prompts": hash_files({"prompts": options.prompts}),
        "per_task": options.per_task,
        "tokens": options.tokens,
        "dtype": options.dtype,
        "device": options.device,
    }
    check_identity(options.work, identity)
    eos = sorted(engine.eos_token_ids)
    rows = choose_rows(options.prompts, options.per_task)
    texts = write_texts_plainly(engine, rows, options.tokens, eos, Kept(options.work / "texts.json"))
    return Bench(engine, texts, options.tokens, eos, Kept(options.work / "acceptance.json"))


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what is not known yet, and compare."""
    with load_engine(options.model, "none", dtype=options.dtype, device=options.device) as engine:
        bench = make_bench(options, engine)
        acceptance = measure_acceptance(bench, options)
        found = run_arms(bench, plan_arms(bench, options), options)
        return {
            "arms": compare(found, bench.texts),
            "acceptance": acceptance,
            "verdicts": judge(found, bench.texts, options),
            "drafts": options.drafts,
            "budgets": options.budgets,
            "versions": list_versions(),
            "notes": write_notes(bench, options),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/speculation_benchmark"))
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--drafts", default=",".join(DRAFTS), help="the first is judged")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--assistant-tokens", default="20", help="constants of assisted generation")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSONL")
    parser.add_argument("--per-task", type=int, default=3, help="prompts of each task")
    parser.add_argument("--few", type=int, default=1, help="of these, for what takes long")
    parser.add_argument("--tokens", type=int, default=128, help="of a text at most")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--show", action="store_true", help="measure nothing, show what is known")
    options = parser.parse_args(arguments)
    options.drafts = options.drafts.split(",")
    for name in ("budgets", "assistant_tokens"):
        setattr(options, name, [int(value) for value in getattr(options, name).split(",")])
    if options.quick:
        options.per_task, options.few, options.tokens = 1, 1, min(options.tokens, 24)
        options.budgets = [8, JUDGED]
    found = benchmark(options)
    if options.json:
        write_atomically(options.json, json.dumps(found, indent=1).encode())
    print(table(found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"speculation.py: {error}", file=sys.stderr)
        sys.exit(2)

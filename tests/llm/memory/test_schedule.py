"""Blocks of batches write what `generate` writes, wherever their weights, caches and hidden states lie."""

import itertools
import os
import time
from pathlib import Path
from typing import Any

import decoder_toys as toys
import pytest
import torch

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.engine.drafts import LookupDraft
from t2iprobe.llm.engine.generation import Generated, Trees, generate
from t2iprobe.llm.engine.processing import Sampling
from t2iprobe.llm.memory import schedule, tiers
from t2iprobe.llm.memory.cost import Hardware, ModelShape, Workload, count_costs, count_placed
from t2iprobe.llm.memory.ledger import Ledger
from t2iprobe.llm.memory.packing import Packed, pack_layers, read_rest
from t2iprobe.llm.memory.placement import Placement, Shares
from t2iprobe.llm.memory.schedule import arrange, open_source, open_store, write_batches
from t2iprobe.llm.memory.tiers import BatchCache
from t2iprobe.llm.models import decoder_layers, find_language_model, load_without_layers

DEVICE, RAM, DISK = Shares(1, 0, 0), Shares(0, 1, 0), Shares(0, 0, 1)
LENGTHS = (5, 3, 9, 4, 7, 3, 12)
PROMPTS = [toys.random_tokens(length, seed=length + 20 * row) for row, length in enumerate(LENGTHS)]
NEW = 11


class Toy:
    """A toy of a family, packed, and what it writes without any schedule."""

    def __init__(self, family: str, folder: Path) -> None:
        self.model = toys.tiny_model(family)
        self.model.save_pretrained(folder / "model")
        self.packed = pack_layers(folder / "model", folder / "packed")
        self._files = find_language_model(str(folder / "model"))
        self.folder = folder
        self._plain: dict[Any, list[Generated]] = {}

    def empty(self) -> Any:
        return load_without_layers(self._files, read_rest(self.packed), dtype="float64")

    def plain(
        self, sampling: Sampling | None = None, eos: tuple[int, ...] = (), **more: Any
    ) -> list[Generated]:
        key = (sampling, eos, str(more))
        if key not in self._plain:
            self._plain[key] = generate(
                Decoder(self.model), None, PROMPTS, sampling=sampling, trees=Trees("none"),
                max_new_tokens=NEW, eos_token_ids=eos, **more,
            )  # fmt: skip
        return self._plain[key]


_toys: dict[str, Toy] = {}


@pytest.fixture
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    family = getattr(request, "param", "llama")
    if family not in _toys:
        _toys[family] = Toy(family, tmp_path_factory.mktemp("toy"))
    return _toys[family]


def make_placement(
    batch: int = 2, batches: int = 2, weights: Shares = DISK, cache: Shares = DEVICE, hidden: Shares = DEVICE,
    **more: Any,
) -> Placement:  # fmt: skip
    return Placement(batch, batches, weights, cache, hidden, **more)


def write(
    toy: Toy,
    placement: Placement,
    prompts: list[torch.Tensor] = PROMPTS,
    eos: tuple[int, ...] = (),
    **more: Any,
) -> tuple[list[Generated], Any, Any]:
    """The outcomes, the report and the store's counters."""
    found: list[tuple[int, Generated]] = []
    ledger = more.setdefault("ledger", Ledger())
    more.setdefault("disk", toy.folder / "disk")
    source = open_source(toy.packed, placement.weight_bits)
    with open_store(placement, source, ledger=ledger) as store:
        report = write_batches(
            toy.empty(), store, placement, prompts, max_new_tokens=NEW, eos_token_ids=eos,
            on_results=found.extend, **more,
        )  # fmt: skip
        counters = store.counters
    first = more.get("first", 0)
    assert [number for number, _ in found] == list(range(first, first + len(prompts)))  # in order
    return [made for _, made in found], report, counters


def tokens(found: list[Generated]) -> list[list[int]]:
    return [made.token_ids for made in found]


CORNERS = list(itertools.product((DEVICE, RAM, DISK), repeat=3))
NAMES = {DEVICE: "device", RAM: "ram", DISK: "disk"}


@pytest.mark.parametrize("corner", CORNERS, ids=lambda each: "-".join(NAMES[share] for share in each))
def test_every_corner_writes_the_same_text(toy: Toy, corner: tuple[Shares, Shares, Shares]) -> None:
    found, _, _ = write(toy, make_placement(2, 2, *corner))
    assert tokens(found) == tokens(toy.plain())


@pytest.mark.parametrize(
    "toy", ["llama", "gpt-neox", "gemma3", "qwen2 with windows", "gpt2", "opt"], indirect=True
)
@pytest.mark.parametrize(("batch", "batches"), [(1, 1), (3, 1), (1, 3), (2, 4), (7, 1)])
def test_mixed_shares_write_the_same_text(toy: Toy, batch: int, batches: int) -> None:
    mixed = Shares(0.4, 0.3, 0.3)
    found, _, _ = write(toy, make_placement(batch, batches, mixed, mixed, mixed))
    assert tokens(found) == tokens(toy.plain())


@pytest.mark.parametrize("cache", [DEVICE, RAM, DISK])
def test_rows_that_end_leave_their_batch_and_others_stay_right(toy: Toy, cache: Shares) -> None:
    free = toy.plain()
    eos = tuple({made.token_ids[place] for place, made in zip((1, 3, 3, 6), free[1:], strict=False)})
    expected = toy.plain(eos=eos)
    lengths = [len(made.token_ids) for made in expected]
    assert min(lengths) < max(lengths)
    rows: list[int] = []
    run = Decoder.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Decoder, "run", lambda self, ids, *a, **k: rows.append(len(ids)) or run(self, ids, *a, **k)
        )
        found, report, _ = write(toy, make_placement(3, 2, cache=cache), eos=eos)
    assert tokens(found) == tokens(expected)
    assert [made.stop_reason for made in found] == [made.stop_reason for made in expected]
    # Nothing is computed for a text that has ended: a prompt's pass, and one for each further token.
    assert sum(rows) == sum(lengths)
    assert report.tokens == sum(lengths)


def test_a_layer_is_loaded_once_a_pass_for_all_batches(toy: Toy) -> None:
    one_third = Shares(1 / 3, 0, 2 / 3)
    _, report, counters = write(toy, make_placement(1, 7, one_third))
    assert (report.blocks, report.passes) == (1, NEW)  # the prompts' pass gives the first token
    assert report.loads == report.passes * 2
    assert counters.passes == report.passes
    nbytes = [file.nbytes for file in toy.packed.layers]
    assert counters.bytes_used == report.passes * (nbytes[0] + nbytes[2])
    _, row_by_row, _ = write(toy, make_placement(1, 1, one_third))
    assert row_by_row.loads == 7 * report.loads


def test_sampled_texts_depend_on_their_number_alone(toy: Toy) -> None:
    sampling = Sampling(temperature=0.8, top_k=12, repetition_penalty=1.2, no_repeat_ngram=3, seed=5)
    expected = toy.plain(sampling)
    assert tokens(expected) != tokens(toy.plain(Sampling(temperature=0.8, seed=6)))
    for placement in (make_placement(2, 2), make_placement(3, 1, cache=DISK)):
        assert tokens(write(toy, placement, sampling=sampling)[0]) == tokens(expected)
    later, _, _ = write(toy, make_placement(2, 2), PROMPTS[3:], sampling=sampling, first=3)
    assert tokens(later) == tokens(expected[3:])


@pytest.mark.parametrize("toy", ["llama", "gemma3", "gpt2"], indirect=True)
def test_prompts_in_parts_write_the_same_text(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "PROMPT_ROWS", 6)
    found, report, _ = write(toy, make_placement(2, 2, cache=Shares(0.5, 0, 0.5), hidden=DISK))
    assert tokens(found) == tokens(toy.plain())
    assert report.passes > 2 * NEW


def test_the_end_of_the_context_ends_a_text(toy: Toy) -> None:
    long = toys.random_tokens(toys.CONTEXT - 4, seed=3)
    prompts = [long, PROMPTS[0]]
    expected = generate(Decoder(toy.model), None, prompts, trees=Trees("none"), max_new_tokens=NEW)
    found, _, _ = write(toy, make_placement(2, 1), prompts)
    assert tokens(found) == tokens(expected)
    assert [made.stop_reason for made in found] == ["context", "length"]
    with pytest.raises(UserError, match="the model's context ends"):
        write(toy, make_placement(2, 1), [toys.random_tokens(toys.CONTEXT)])


@pytest.mark.parametrize("share", [DEVICE, DISK, Shares(1 / 3, 0, 2 / 3)])
def test_weights_in_4_bits_are_those_of_a_model_that_was_rounded(toy: Toy, share: Shares) -> None:
    from t2iprobe.llm.memory.quantization import dequantize, quantize

    rounded = toys.tiny_model("llama")
    for layer in decoder_layers(rounded):
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                out = torch.empty_like(parameter.data)
                dequantize(quantize(parameter.data, 4), out)
                assert not torch.equal(out, parameter.data)
                parameter.data.copy_(out)
    expected = generate(Decoder(rounded), None, PROMPTS, trees=Trees("none"), max_new_tokens=NEW)
    found, report, counters = write(toy, make_placement(2, 4, share, weight_bits=4))
    assert tokens(found) == tokens(expected)
    assert tokens(found) != tokens(toy.plain())
    source = open_source(toy.packed, 4)
    disk = {DEVICE: 0, DISK: 3}.get(share, 2)
    assert counters.bytes_used == report.passes * disk * source.traffic(0)
    assert source.traffic(0) < 0.3 * toy.packed.layers[0].nbytes


@pytest.mark.parametrize("where", [DEVICE, RAM, DISK])
def test_a_cache_in_4_bits_is_the_same_wherever_it_lies(toy: Toy, where: Shares) -> None:
    found, _, _ = write(toy, make_placement(2, 2, cache=where, cache_bits=4))
    on_device, _, _ = write(toy, make_placement(1, 1, cache=DEVICE, cache_bits=4))
    assert tokens(found) == tokens(on_device)
    # A pass uses what it computed as it is, and rounds it behind: the first token is exact.
    assert [made.token_ids[0] for made in found] == [made.token_ids[0] for made in toy.plain()]


def test_attention_where_the_keys_lie_writes_the_same_text(toy: Toy) -> None:
    found, _, _ = write(toy, make_placement(2, 2, cache=Shares(0.5, 0.5, 0), cpu_attention=True))
    assert tokens(found) == tokens(toy.plain())


class Broken(BaseException):
    """Such as KeyboardInterrupt, which is no Exception."""


def open_files(folder: Path) -> list[str]:
    """What this process has open in `folder`, nameless files included."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    return [link for link in links if link.startswith(str(folder))]


@pytest.mark.parametrize("when", ["first layer", "second batch", "later pass", "results"])
@pytest.mark.parametrize("error", [RuntimeError, Broken])
def test_an_error_reaches_the_caller_and_leaves_nothing(
    toy: Toy, when: str, error: type[BaseException]
) -> None:
    placement = make_placement(2, 2, cache=DISK, hidden=DISK)
    disk, ledger, model = toy.folder / "other", Ledger(), toy.empty()
    calls = itertools.count()
    fails_at = {"first layer": 0, "second batch": 4, "later pass": 3 * 6 + 1, "results": 10**9}[when]
    # Layer 0 of batches 0 and 1, layer 1 of both, and so on.

    def fail(*_: Any) -> None:
        if next(calls) == fails_at or when == "results":
            raise error("broken")

    if when != "results":
        for layer in decoder_layers(model):
            layer.register_forward_hook(fail)
    with open_store(placement, open_source(toy.packed), ledger=ledger) as store:
        before = ledger.left("device"), sum(ledger._taken["device"].values())
        with pytest.raises(error, match="broken"):
            write_batches(
                model, store, placement, PROMPTS, disk=disk, ledger=ledger, max_new_tokens=NEW,
                on_results=fail if when == "results" else lambda _: None,
            )  # fmt: skip
        assert (ledger.left("device"), sum(ledger._taken["device"].values())) == before
        assert not store._held
    assert all(parameter.is_meta for parameter in decoder_layers(model).parameters())
    assert not any(each._forward_pre_hooks for each in decoder_layers(model))
    assert list(disk.iterdir()) == []
    assert not open_files(disk)


def test_the_next_chunk_is_on_its_way_and_no_other(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[BatchCache] = []
    begin, update = BatchCache.__init__, BatchCache.update

    def watched_begin(self: BatchCache, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        caches.append(self)

    seen: list[tuple[int, int]] = []

    def watched_update(self: BatchCache, keys: Any, values: Any, layer: int, *more: Any) -> Any:
        found = update(self, keys, values, layer, *more)
        if self.length:
            chunks = [chunk for cache in caches for chunk in cache._chunks.values()]
            seen.append(
                (
                    sum(chunk.near is not None for chunk in chunks),
                    sum(chunk.coming is not None for chunk in chunks),
                )
            )
        return found

    monkeypatch.setattr(BatchCache, "__init__", watched_begin)
    monkeypatch.setattr(BatchCache, "update", watched_update)
    write(toy, make_placement(2, 2, cache=DISK), PROMPTS[:4])
    assert len(seen) == (NEW - 1) * 3 * 2
    # In the last layer of the last batch there is nothing to come.
    assert set(seen) == {(1, 1), (1, 0)}
    assert seen.count((1, 0)) == NEW - 1


def test_the_same_placement_opens_a_speculative_target(toy: Toy) -> None:
    source = open_source(toy.packed)
    with open_store(make_placement(1, 1, Shares(1 / 3, 0, 2 / 3)), source) as store:
        assert store.resident == (1,)
        made = generate(
            Decoder(toy.empty(), store), LookupDraft(toys.VOCABULARY), PROMPTS, max_new_tokens=NEW
        )
        assert tokens(made) == tokens(toy.plain())


def test_the_disk_is_empty_afterwards(toy: Toy) -> None:
    disk = toy.folder / "third"
    write(toy, make_placement(2, 2, cache=DISK, hidden=DISK), disk=disk)
    assert list(disk.iterdir()) == []
    assert not open_files(disk)


def test_what_is_not_in_the_budget_is_refused_before_it_is_allocated(toy: Toy) -> None:
    placement = make_placement(2, 2, Shares(1 / 3, 0, 2 / 3), Shares(0.5, 0, 0.5), Shares(0.5, 0, 0.5))
    roomy = Ledger()
    write(toy, placement, ledger=roomy)
    names = roomy.report()["device"]
    assert set(names) == {
        *("layers that stay", "layers on their way", "workspace", "hidden states", "masks"),
        *("cache", "cache in use", "between memory and disk"),
    }
    assert roomy.left("device") is None
    peak = roomy.peak["device"]
    exact = Ledger({"device": peak})
    assert tokens(write(toy, placement, ledger=exact)[0]) == tokens(toy.plain())
    with pytest.raises(UserError, match=f"the device budget of {peak // 2} has .* left"):
        write(toy, placement, ledger=Ledger({"device": peak // 2}))
    with pytest.raises(UserError, match="layers that stay needs"):
        write(toy, placement, ledger=Ledger({"device": 1000}))
    with pytest.raises(UserError, match="in which folder"):
        write(toy, placement, disk=None)


def test_batches_that_are_through_leave_their_room_to_the_others(toy: Toy) -> None:
    """Of hidden states that lie on the disk, one batch's are in memory at a time, also in the last layer."""
    prompts = [torch.arange(2, 9) + number for number in range(8)]
    taken = []
    for share in (DEVICE, DISK):
        ledger = Ledger()
        write(toy, make_placement(2, 4, hidden=share), prompts, ledger=ledger)
        taken.append(ledger.report()["device"]["hidden states"])
    assert taken[0] == 4 * taken[1]


def test_a_slow_disk_needs_no_more_than_the_planner_counts(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states of four batches at most: one in use, one coming, two being written."""
    write_now = tiers._File._write

    def write_slowly(*arguments: Any) -> None:
        time.sleep(0.002)
        write_now(*arguments)

    monkeypatch.setattr(tiers._File, "_write", write_slowly)
    prompts = [torch.arange(2, 9) + number for number in range(12)]
    placement, ledger = make_placement(2, 6, hidden=DISK), Ledger()
    write(toy, placement, prompts, ledger=ledger)
    names = ledger.report()["device"]
    assert names["hidden states"] < names["between memory and disk"] <= 3 * names["hidden states"]
    shape = ModelShape.from_model(toy.empty(), toy.packed)
    machine = Hardware({1: 1.0}, {1: 1.0}, *[1.0] * 9)
    costs = count_costs(shape, machine, Workload(12, 7, NEW), [2] * 6)
    assert ledger.peak["device"] + shape.rest_bytes <= costs.nbytes["device"] @ count_placed(
        placement, shape.layers, 6
    )


def test_batches_hold_prompts_of_like_lengths() -> None:
    lengths = [9, 1, 8, 2, 7, 3, 30, 30, 1]
    windows = list(arrange(lengths, 2, 2))
    assert len(windows) == 1  # smaller blocks look for each other in a window
    parts = [part for block in windows[0] for part in block]
    assert [sorted(lengths[n] for n in part) for part in parts] == [[30, 30], [8, 9], [3, 7], [1, 2], [1]]
    assert [len(block) for block in windows[0]] == [2, 2, 1]
    assert sorted(n for part in parts for n in part) == list(range(9))
    many = list(arrange(list(range(100)), 4, 10))
    assert [sorted(n for block in window for part in block for n in part) for window in many] == [
        list(range(0, 40)),
        list(range(40, 80)),
        list(range(80, 100)),
    ]


def test_a_model_that_skips_layers_is_noticed(toy: Toy) -> None:
    model = toy.empty()
    placement = make_placement()
    with open_store(placement, open_source(toy.packed)) as store:
        model.model.forward = lambda *_, **__: decoder_layers(model)[1](torch.zeros(2, 1, 32))
        with pytest.raises(RuntimeError, match="the model came to layer 1 instead of 0"):
            write_batches(model, store, placement, PROMPTS[:2], on_results=lambda _: None)


def test_packing_in_4_bits_is_done_once(toy: Toy, tmp_path: Path) -> None:
    from t2iprobe.llm.memory.packing import pack_quantized

    first: Packed = pack_quantized(toy.packed, tmp_path / "few", 4)
    times = [file.path.stat().st_mtime_ns for file in first.layers]
    again = pack_quantized(toy.packed, tmp_path / "few", 4)
    assert [file.path.stat().st_mtime_ns for file in again.layers] == times
    assert "self_attn.q_proj.weight|0" in again.layers[0].layout
    coarser = pack_quantized(toy.packed, tmp_path / "few", 2)
    assert coarser.layers[0].nbytes < first.layers[0].nbytes

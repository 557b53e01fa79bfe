import itertools
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from t2iprobe.errors import UserError
from t2iprobe.llm.memory import sources, store
from t2iprobe.llm.memory.packing import BLOCK, Packed, Place
from t2iprobe.llm.memory.sources import Capped, DiskSource, QuantizedSource, RamSource, Source, padded
from t2iprobe.llm.memory.store import WeightStore, choose_resident, spread_evenly


class ToySource:
    """Layers of `chunks` chunks of 100 bytes; layer i is full of the number i. Whatever happens is noted.

    A layer in `failing` fails after its first chunk. While `gate` is closed, nothing arrives.
    """

    def __init__(self, layers: int, chunks: int = 3) -> None:
        self.layers, self.chunks = layers, chunks
        self.failing: dict[int, BaseException] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.begun: list[int] = []
        self.whole: list[int] = []
        self.buffers: set[int] = set()

    def nbytes(self, layer: int) -> int:
        return 100 * self.chunks

    traffic = nbytes

    def layout(self, layer: int) -> dict[str, Place]:
        return {"weight": Place(0, (100 * self.chunks,), torch.uint8)}

    def read(self, layer: int, out: torch.Tensor) -> Iterator[int]:
        self.begun.append(layer)
        self.buffers.add(out.data_ptr())
        for chunk in range(self.chunks):
            self.gate.wait(30)
            out[100 * chunk : 100 * chunk + 100] = layer
            yield 100
            if layer in self.failing:
                raise self.failing[layer]
        self.whole.append(layer)


def use(weights: WeightStore, *layers: int) -> None:
    """Compute with these layers of a toy source: they must hold what they should, all the while."""
    for layer in layers:
        tensor = weights.acquire(layer)["weight"]
        assert (tensor == layer).all()
        time.sleep(0.0005)
        assert (tensor == layer).all()
        weights.release(layer)


def settle(weights: WeightStore) -> None:
    """Wait until the reader has nothing left to do: every buffer is full, or it met an error."""
    while weights._reader and not weights._is_paused:
        with weights._changed:
            if len(weights._ready) + len(weights._held) == weights.buffers:
                return
        time.sleep(0.001)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "weight reader"]


@pytest.fixture(autouse=True)
def _leave_no_thread() -> Iterator[None]:
    yield
    assert not readers()


@pytest.mark.parametrize("kind", ["disk", "ram", "capped"])
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize(("resident", "buffers"), [((), 1), ((), 2), ((1, 3), 2), ((0, 1, 2, 3), 2)])
def test_every_weight_is_what_the_files_hold(
    packed: Packed, kind: str, prefetch: bool, resident: tuple[int, ...], buffers: int
) -> None:
    disk = DiskSource(packed)
    source: Source = {"disk": disk, "ram": RamSource(disk), "capped": Capped(disk, 1e9)}[kind]
    files = [load_file(file.path) for file in packed.layers]
    with WeightStore(source, resident, buffers, prefetch=prefetch) as weights:
        for _, layer in itertools.product(range(3), range(4)):
            tensors = weights.acquire(layer)
            assert tensors.keys() == files[layer].keys()
            for name, expected in files[layer].items():
                assert torch.equal(tensors[name].view(torch.uint8), expected.view(torch.uint8))
            del tensors
            weights.release(layer)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("resident", [(), (0, 2), (1,), (0, 1, 2, 3)])
@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_every_byte_is_counted(
    packed: Packed, resident: tuple[int, ...], buffers: int, prefetch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK", 5 * BLOCK)
    size = packed.layers[0].nbytes
    streamed = 4 - len(resident)
    buffers = min(buffers, streamed)
    with WeightStore(DiskSource(packed), resident, buffers or 1, prefetch=prefetch) as weights:
        for passes in range(1, 4):
            for layer in range(4):
                weights.acquire(layer)
                weights.release(layer)
            settle(weights)
            counters = weights.counters
            ahead = buffers if prefetch else 0
            assert counters.bytes_read == (len(resident) + passes * streamed + ahead) * size
            assert counters.bytes_used == passes * streamed * size
            assert counters.passes == passes
            assert counters.resident_peak_bytes == (len(resident) + buffers) * padded(size)
            assert counters.stalls == passes * streamed or prefetch


def test_bytes_of_few_bits_are_counted_as_stored(packed: Packed) -> None:
    source = QuantizedSource(DiskSource(packed), 4)
    with WeightStore(source, buffers=2) as weights:
        for layer in range(4):
            weights.acquire(layer)
            weights.release(layer)
        settle(weights)
        assert weights.counters.bytes_used == 4 * source.traffic(0)
        assert weights.counters.bytes_read == 6 * source.traffic(0)


@pytest.mark.parametrize("buffers", [1, 2, 3, 9])
def test_no_more_buffers_than_asked_for(buffers: int) -> None:
    source = ToySource(6)
    with WeightStore(source, (2,), buffers) as weights:
        for _ in range(5):
            use(weights, *range(6))
        assert weights.buffers == min(buffers, 5)
        assert len(source.buffers) == weights.buffers + 1  # one for the layer that stays


def test_layers_are_read_in_order_and_on_into_the_next_pass() -> None:
    source = ToySource(5)
    with WeightStore(source, (1,), 3) as weights:
        settle(weights)
        assert source.begun == [1, 0, 2, 3]  # before anything was asked for, and not more than fits
        use(weights, 0, 1, 2)
        settle(weights)
        assert source.begun == [1, 0, 2, 3, 4, 0]
        use(weights, 3, 4, 0, 1, 2)
        settle(weights)
        assert source.begun == [1, 0, 2, 3, 4, 0, 2, 3, 4, 0]
        assert source.begun == source.whole
        assert weights.counters.stalls == 0


def test_a_layer_in_use_is_not_overwritten() -> None:
    source = ToySource(6)
    with WeightStore(source, buffers=2) as weights:
        tensor = weights.acquire(0)["weight"]
        settle(weights)
        assert source.begun == [0, 1]
        assert (tensor == 0).all()
        weights.release(0)
        settle(weights)
        assert source.begun == [0, 1, 2]


def test_two_layers_may_be_used_at_once_and_no_more_than_there_are_buffers() -> None:
    with WeightStore(ToySource(6), buffers=2) as weights:
        first, second = weights.acquire(0)["weight"], weights.acquire(1)["weight"]
        with pytest.raises(RuntimeError, match=r"layers \[0, 1\] hold all buffers"):
            weights.acquire(2)
        assert (first == 0).all()
        assert (second == 1).all()
        weights.release(0)
        weights.release(0)  # again: nothing
        use(weights, 2)
        assert (second == 1).all()


def test_a_wait_is_counted_as_a_stall() -> None:
    source = ToySource(3)
    source.gate.clear()
    with WeightStore(source) as weights:
        threading.Timer(0.3, source.gate.set).start()
        use(weights, 0)
        counters = weights.counters
        assert counters.stalls == 1
        assert 0 < counters.stall_seconds < 20
        settle(weights)
        use(weights, 1)
        assert weights.counters.stalls == 1
        assert weights.counters.stall_seconds == counters.stall_seconds
        assert counters.bytes_used == 300  # a copy: it does not change later


def test_without_prefetch_nothing_is_read_before_it_is_asked_for() -> None:
    source = ToySource(4)
    with WeightStore(source, (1,), prefetch=False) as weights:
        assert not readers()
        assert source.begun == [1]
        use(weights, 0, 1, 2)
        assert source.begun == [1, 0, 2]
        use(weights, 3, 0)
        assert source.begun == [1, 0, 2, 3, 0]
        assert weights.counters.stalls == 4
        assert weights.counters.bytes_read - 300 == weights.counters.bytes_used == 1200


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("left_at", range(5))
@pytest.mark.parametrize("resident", [(), (0,), (0, 3)])
def test_a_pass_that_was_broken_off_is_forgotten(
    left_at: int, buffers: int, prefetch: bool, resident: tuple[int, ...]
) -> None:
    with WeightStore(ToySource(5), resident, buffers, prefetch=prefetch) as weights:
        for _ in range(4):
            use(weights, *range(left_at))
            weights.acquire(left_at)  # an exception in this layer: nobody releases it
            use(weights, *range(5))
        assert weights.counters.passes == 8


def test_passes_that_end_early_and_layers_in_any_order() -> None:
    order = torch.randint(6, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    for buffers in (1, 2, 4):
        source = ToySource(6)
        with WeightStore(source, (4,), buffers) as weights:
            use(weights, *order)
            use(weights, *[0, 1, 2] * 20)  # early exit after three layers
            used = sum(layer != 4 for layer in order) + 60
            assert weights.counters.bytes_used == used * 300
            assert weights.counters.bytes_read >= weights.counters.bytes_used
            assert len(source.buffers) == buffers + 1


def test_what_was_read_in_vain_is_counted_and_broken_off() -> None:
    source = ToySource(10, chunks=50)
    source.gate.clear()
    with WeightStore(source, buffers=1) as weights:
        while source.begun != [0]:
            time.sleep(0.001)
        threading.Timer(0.05, source.gate.set).start()
        use(weights, 5)
        assert 0 not in source.whole
        assert weights.counters.bytes_used == 5000
        assert 5100 <= weights.counters.bytes_read <= 10_100  # a chunk of layer 0, and what follows layer 5


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("error", [UserError("the disk is gone"), KeyError("bug"), SystemExit(3)])
def test_an_error_of_the_reader_reaches_the_caller_and_the_store_lives_on(
    error: BaseException, prefetch: bool
) -> None:
    source = ToySource(5)
    source.failing[2] = error
    with WeightStore(source, buffers=3, prefetch=prefetch) as weights:
        settle(weights)
        for _ in range(3):
            use(weights, 0, 1)  # what came before the error is good
            with pytest.raises(type(error)) as raised:
                weights.acquire(2)
            assert raised.value is error
        with pytest.raises(type(error)):
            weights.acquire(2)  # tried again, and again in vain
        source.failing.clear()
        use(weights, 2, 3, 4, 0, 1, 2)


def test_an_error_in_a_layer_that_nobody_asks_for_is_no_error() -> None:
    source = ToySource(5)
    source.failing[2] = KeyError("bug")
    with WeightStore(source) as weights:
        for _ in range(5):
            use(weights, 0, 1)
            settle(weights)
        use(weights, 3, 4, 0, 1)


def test_an_error_while_loading_what_stays_leaves_nothing_behind() -> None:
    source = ToySource(5)
    source.failing[2] = UserError("truncated")
    with pytest.raises(UserError, match="truncated"):
        WeightStore(source, (1, 2))
    assert not readers()


def test_a_truncated_file_is_told_by_the_store(packed: Packed) -> None:
    path = packed.layers[3].path
    path.write_bytes(path.read_bytes()[:-1])
    with WeightStore(DiskSource(packed)) as weights:
        for layer in range(3):
            weights.acquire(layer)
            weights.release(layer)
        with pytest.raises(UserError, match="layer_003.safetensors has .* bytes instead of"):
            weights.acquire(3)


def test_closing_breaks_off_a_read_and_gives_the_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 1000)
    slow = Capped(RamSource(ToySource(3, chunks=200)), 1e4)  # two seconds a layer
    weights = WeightStore(slow, buffers=2)
    while not weights.counters.bytes_read:
        time.sleep(0.001)
    weights.close()
    assert weights.counters.bytes_read < 20_000
    assert not readers()
    for _ in range(2):
        weights.close()  # again: nothing
        with pytest.raises(RuntimeError, match="the weight store is closed"):
            weights.acquire(0)


@pytest.mark.parametrize("resident", [(), (0,)])
def test_the_memory_is_free_when_the_store_is_closed(
    resident: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = []
    allocate = store.empty_buffer

    def watch(*args: object) -> torch.Tensor:
        buffer = allocate(*args)
        alive.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(store, "empty_buffer", watch)
    weights = WeightStore(ToySource(4), resident)
    weights.acquire(0)
    weights.close()
    assert len(alive) == 2 + len(resident)
    assert not [each for each in alive if each() is not None]


def test_closing_wakes_who_waits() -> None:
    source = ToySource(3)
    source.gate.clear()
    weights = WeightStore(source)
    told: list[BaseException] = []

    def ask() -> None:
        try:
            weights.acquire(0)
        except RuntimeError as error:
            told.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.05)
    threading.Timer(0.1, source.gate.set).start()  # a read that hangs for a while
    weights.close()
    thread.join(10)
    assert "closed" in str(told[0])


def test_an_exception_in_the_context_closes_the_store() -> None:
    weights = WeightStore(ToySource(3))
    with pytest.raises(KeyError), weights:
        raise KeyError
    assert not readers()
    with pytest.raises(RuntimeError, match="closed"):
        weights.acquire(0)


def test_a_store_made_in_inference_mode_is_filled_outside_of_it() -> None:
    with torch.inference_mode():
        weights = WeightStore(ToySource(4), (1,))
        use(weights, 0, 1)
    with weights:
        use(weights, 2, 3, 0)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match="there is no layer 4 to stay: the model has 4"):
        WeightStore(ToySource(4), (1, 4))
    with pytest.raises(UserError, match="needs 1 buffer or more, not 0"):
        WeightStore(ToySource(4), buffers=0)


@pytest.mark.parametrize("layers", [1, 2, 5, 30])
def test_what_stays_is_spread_evenly(layers: int) -> None:
    for count in range(layers + 1):
        resident = spread_evenly(count, layers)
        assert len(set(resident)) == count
        assert set(resident) <= set(range(layers))
        # Runs of streamed layers, around the end into the next pass, differ by one layer at most.
        if count > 1:
            gaps = [(after - before - 1) % layers for before, after in itertools.pairwise(resident)]
            gaps.append((resident[0] - resident[-1] - 1) % layers)
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("buffers", [1, 2, 4])
def test_as_much_stays_as_the_budget_holds(buffers: int) -> None:
    sizes, fixed = [10 * BLOCK] * 8, 50_000
    for budget in range(fixed + 10 * BLOCK, fixed + 100 * BLOCK, BLOCK):
        placement = choose_resident(sizes, budget, fixed, buffers)
        assert placement.nbytes <= budget
        streamed = 8 - len(placement.resident)
        assert placement.nbytes == fixed + 10 * BLOCK * (len(placement.resident) + placement.buffers)
        assert placement.buffers == min(buffers, streamed, (budget - fixed) // (10 * BLOCK))
        if streamed:
            assert budget - placement.nbytes < 10 * BLOCK
    assert choose_resident(sizes, 10**9, fixed, buffers).resident == tuple(range(8))
    assert choose_resident(sizes, 10**9, fixed, buffers).buffers == 0


def test_the_ring_holds_the_largest_layer_that_streams() -> None:
    sizes = [BLOCK, BLOCK, 9 * BLOCK, BLOCK]
    assert choose_resident(sizes, 12 * BLOCK, 0, 2).resident == (0, 1, 2, 3)
    assert choose_resident(sizes, 12 * BLOCK - 1, 0, 1).resident == (1, 3)
    assert choose_resident(sizes, 11 * BLOCK - 1, 0, 1).resident == (2,)
    assert choose_resident(sizes, 9 * BLOCK, 0, 1).resident == ()


def test_a_budget_that_is_too_small_is_told_the_least() -> None:
    for buffers in (1, 2):
        with pytest.raises(UserError) as error:
            choose_resident([100, 5000, 300], 1000 + 2 * BLOCK - 1, 1000, buffers)
        assert str(error.value) == (
            f"the memory budget of {1000 + 2 * BLOCK - 1} bytes is too small: embedding, head and draft "
            f"take 1000 and the largest layer {2 * BLOCK}; give {1000 + 2 * BLOCK} or more"
        )
        assert choose_resident([100, 5000, 300], 1000 + 2 * BLOCK, 1000, buffers).buffers == 1


def test_a_store_keeps_to_its_placement(packed: Packed) -> None:
    source = DiskSource(packed)
    sizes = [source.nbytes(layer) for layer in range(4)]
    placement = choose_resident(sizes, 3 * padded(sizes[0]) + 1, 0)
    assert placement.resident == (2,)
    with WeightStore(source, placement.resident, placement.buffers) as weights:
        assert weights.counters.resident_peak_bytes == placement.nbytes

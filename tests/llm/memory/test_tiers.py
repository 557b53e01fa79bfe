"""Caches and hidden states on every tier hold what was put there, in the memory that was taken for it."""

import threading
from pathlib import Path
from typing import Any

import decoder_toys as toys
import pytest
import torch
from full_disk import file_limit

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.memory.ledger import Ledger
from t2iprobe.llm.memory.quantization import dequantize_rows, quantize_rows, row_bytes
from t2iprobe.llm.memory.tiers import (
    BatchCache,
    DiskTier,
    HiddenStates,
    attend_where_keys_lie,
    computing_where_keys_lie,
)

SHAPE = (2, 6)  # heads, numbers each


def states(batch: int, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, SHAPE[0], rows, SHAPE[1], generator=generator, dtype=torch.float64)
    return keys, values


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("tier", ["device", "ram", "disk"])
def test_a_cache_gives_back_what_it_was_given(tier: str, bits: int | None, tmp_path: Path) -> None:
    ledger = Ledger()
    with DiskTier(tmp_path) as disk:
        cache = BatchCache([0, 2, 1, 0], 12, lambda _: tier, bits=bits, ledger=ledger, disk=disk)
        told: dict[int, list[torch.Tensor]] = {0: [], 1: []}
        seed = 0
        for rows, stay in ((5, None), (1, None), (3, [0, 3, 2]), (1, [2, 1]), (1, None)):
            for layer in (0, 1):
                seed += 1
                new = torch.stack(states(cache.batch, rows, seed))
                cache.fetch(layer)
                found = torch.stack(cache.update(*new, layer))
                before = told[layer]
                expected = torch.cat([*before, new], 3)
                # The rows of this pass are exact; what was packed before is near.
                torch.testing.assert_close(found[..., -rows:, :], new, rtol=0, atol=0)
                torch.testing.assert_close(found, expected, rtol=0, atol=0.2 if bits else 0.0)
                assert bits is None or not before or not torch.equal(found, expected)
                cache.settle(layer)
                told[layer] = [expected]
            cache.advance(rows)
            if stay is not None:
                cache.select(stay)
                told = {layer: [part[:, stay] for part in parts] for layer, parts in told.items()}
        disk.wait(0)
        taken = {name: size for name, size in ledger._taken["device"].items() if size}
        assert set(taken) == ({"cache"} if tier == "device" else set())  # nothing is near between passes
        if tier != "device":
            numbers = 2 * SHAPE[0] * SHAPE[1]
            each = numbers * 8 if bits is None else 2 * row_bytes(numbers // 2)
            assert ledger.peak[tier] == 2 * 4 * 12 * each
        cache.close()
        assert not any(size for names in ledger._taken.values() for size in names.values())


def test_what_is_read_again_from_4_bits_does_not_drift(tmp_path: Path) -> None:
    with DiskTier(tmp_path) as disk:
        cache = BatchCache([0, 0], 40, lambda _: "disk", bits=4, disk=disk)
        first = torch.stack(states(2, 4, 0))
        seen = []
        for step in range(30):
            new = first if step == 0 else torch.stack(states(cache.batch, 1, step))
            found = torch.stack(cache.update(*new, 0))
            seen.append(found[:, 0, :, :4].clone())
            cache.settle(0)
            cache.advance(new.shape[3])
            if step == 7:
                cache.select([0])
        assert all(torch.equal(each, seen[1]) for each in seen[2:])
        assert not torch.equal(seen[0], seen[1])
        cache.close()


def test_masks_are_those_of_the_texts_alone() -> None:
    cache = BatchCache([0, 3], 9)
    cache.length = 2
    for window in (None, 2):
        mask = cache.mask(4, torch.float64, window)
        assert mask.shape == (2, 1, 4, 6)
        for text, pad in enumerate((0, 3)):
            for row in range(4):
                seen = [slot for slot in range(pad, 2 + row + 1) if window is None or 2 + row - slot < window]
                assert (mask[text, 0, row] == 0).nonzero()[:, 0].tolist() == seen
    assert cache.positions(4).tolist() == [[2, 3, 4, 5], [0, 0, 1, 2]]


@pytest.mark.parametrize("scale", [0, 1e-6, 1, 1e4])
@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 128, 150])
def test_rows_in_4_bits_are_off_by_a_thirtieth_of_their_groups_range(width: int, scale: float) -> None:
    rows, generator = 5, torch.Generator().manual_seed(width)
    values = torch.randn(rows, width, generator=generator) * scale + 3
    held = quantize_rows(values)
    assert held.dtype == torch.uint8
    assert held.shape == (rows, row_bytes(width))
    found = dequantize_rows(held, width)
    for begin in range(0, width, 64):
        group, back = values[:, begin : begin + 64], found[:, begin : begin + 64]
        span = group.amax(1, keepdim=True) - group.amin(1, keepdim=True)
        assert ((back - group).abs() <= span / 30 * (1 + 1e-4) + 4 * group.abs() * 2**-23).all()
        if scale == 0:
            assert torch.equal(back, group)
    # A row does not depend on its neighbours: each is complete in itself.
    assert torch.equal(quantize_rows(values[-1:]), held[-1:])


def test_four_bits_are_five_with_their_scales() -> None:
    assert row_bytes(64) == 40
    assert row_bytes(65) == 80
    assert row_bytes(192) * 8 / 192 == 5


@pytest.mark.parametrize("tier", ["device", "ram", "disk"])
def test_hidden_states_come_back_and_their_memory_is_free_meanwhile(tier: str, tmp_path: Path) -> None:
    ledger = Ledger()
    with DiskTier(tmp_path) as disk:
        kept = HiddenStates(tier, ledger, disk)
        whole = torch.randn(3, 4, 8)
        hidden, before = whole[:, 1:], whole.clone()  # a view: whoever else has the memory gets it back, too
        kept.begin(whole.nbytes)
        for _ in range(3):
            kept.put_away(hidden)
            assert hidden.untyped_storage().nbytes() == (whole.nbytes if tier == "device" else 0)
            if tier != "device":
                assert ledger._taken[tier]["hidden states"] == whole.nbytes
                assert ledger._taken["device"]["hidden states"] == 0
            kept.fetch()
            kept.restore()
            assert torch.equal(whole, before)
            whole += 1
            before += 1
        kept.end()
        kept.close()
    assert not any(size for names in ledger._taken.values() for size in names.values())
    if tier == "disk":
        with pytest.raises(UserError, match="in which folder"):
            HiddenStates(tier, ledger)


def test_a_slow_disk_holds_the_computation_up_and_not_its_memory(tmp_path: Path) -> None:
    may_write, asked = threading.Event(), []

    def write(number: int) -> None:
        assert may_write.wait(60)

    def ask() -> None:
        for number in range(5):
            disk.write(write, number)
            asked.append(number)

    with DiskTier(tmp_path) as disk:
        asker = threading.Thread(target=ask)
        asker.start()
        asker.join(0.3)
        assert asker.is_alive()
        assert asked == [0, 1]
        may_write.set()
        asker.join(60)
        assert asked == [0, 1, 2, 3, 4]
        disk.wait(0)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    def fill(cache: BatchCache) -> None:
        for step in range(50):
            cache.update(*states(2, 1, step), 0)
            cache.settle(0)
            cache.advance(1)

    with DiskTier(tmp_path) as disk, file_limit(1000):
        cache = BatchCache([0, 0], 60, lambda _: "disk", disk=disk)
        with pytest.raises(UserError, match="is full"):
            fill(cache)
        cache.close()


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"):
        DiskTier(tmp_path / "file" / "folder")
    before = threading.active_count()
    with DiskTier(tmp_path / "new") as disk:
        cache = BatchCache([0], 4, lambda _: "disk")
        with pytest.raises(UserError, match="in which folder"):
            cache.update(*states(1, 1, 0), 0)
        disk.submit(lambda: None).result()
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(UserError, match="not in 3"):
        BatchCache([0], 4, bits=3)


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "gemma3"])
def test_attention_where_keys_lie_is_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.tiny_model(family)
    decoder = Decoder(model)
    prompts = [toys.random_tokens(length, seed=length) for length in (9, 3)]
    _, expected = decoder.prefill(prompts)
    calls: list[Any] = []
    real = attend_where_keys_lie
    monkeypatch.setattr(
        "t2iprobe.llm.memory.tiers.attend_where_keys_lie", lambda *a, **k: calls.append(a) or real(*a, **k)
    )
    with computing_where_keys_lie(model):
        _, found = decoder.prefill(prompts)
    assert len(calls) == 3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    _, after = decoder.prefill(prompts)
    assert len(calls) == 3  # as it was
    assert torch.equal(after, expected)
    model.set_attn_implementation("eager")
    with (
        pytest.raises(UserError, match="eager attention cannot be computed"),
        computing_where_keys_lie(model),
    ):
        pass


def test_a_ledger_refuses_what_is_not_there() -> None:
    ledger = Ledger({"device": 100, "ram": None})
    ledger.take("device", "layers", 60)
    ledger.take("ram", "anything", 10**12)
    with pytest.raises(
        UserError, match=r"cache needs 41 bytes .* has 40 left \(layers 60\): give 101 or more"
    ):
        ledger.take("device", "cache", 41)
    assert ledger.left("device") == 40  # what is refused is not taken
    assert ledger.left("ram") is None
    with ledger.hold("device", "cache", 40):
        assert ledger.left("device") == 0
    ledger.give("device", "layers", 10)
    ledger.take("device", "layers", 20)
    assert ledger.peak == {"device": 100, "ram": 10**12}
    assert ledger.report()["device"] == {"layers": 70, "cache": 40}
    with pytest.raises(ValueError, match="layers has 70 bytes of device and cannot give 71 back"):
        ledger.give("device", "layers", 71)

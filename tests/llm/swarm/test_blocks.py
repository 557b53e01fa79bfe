"""Blocks alone, one span behind the other, against the whole model; for every family."""

import decoder_toys as toys
import pytest
import torch
from language_toys import make_toy, save_toy

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import pack_model
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.memory.packing import pack_layers, read_rest
from t2iprobe.llm.memory.placement import Placement, Shares
from t2iprobe.llm.memory.schedule import open_source, realise_weights
from t2iprobe.llm.memory.sources import DequantizedSource, DiskSource, QuantizedSource, padded
from t2iprobe.llm.memory.store import WeightStore
from t2iprobe.llm.models import decoder_layers, find_language_model, load_without_layers
from t2iprobe.llm.swarm.blocks import Blocks, Ends, load_blocks, place_blocks

EXACT = dict.fromkeys(toys.FAMILIES, 1e-9) | {"gemma2": 1e-5}
CPU = torch.device("cpu")
ROWS = 9


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def chain(model: torch.nn.Module, copies, spans):
    """Run a text and then a tree through spans of blocks; return the logits of the tree's nodes."""
    decoder = Decoder(model)
    ends = Ends(model, decoder.windows)
    blocks = [Blocks(copy, first, last, CPU) for copy, (first, last) in zip(copies, spans, strict=True)]
    caches = [each.new_cache(1, 4) for each in blocks]
    text = toys.random_tokens(1, ROWS, seed=3)
    tokens = toys.random_tokens(1, 8, seed=4)
    ancestors, depths = toys.random_tree(8, seed=5)

    def run(tokens, positions, mask):
        hidden = ends.embed(tokens, positions)
        for each, held in zip(blocks, caches, strict=True):
            hidden = each.step(hidden, positions, mask, held, range(each.first, each.last))
        return ends.head(hidden)

    run(text, torch.arange(ROWS)[None], torch.ones(1, ROWS, ROWS, dtype=torch.bool).tril())
    for held in caches:
        held.keep([list(range(ROWS))])
    found = run(tokens, ROWS + depths[None], ancestors[None])
    expected = [torch.cat([text[0], tokens[0][seen]]) for seen in ancestors]
    return found[0], expected


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_spans_one_behind_the_other_are_the_model(family):
    plain = toys.tiny_model(family)
    copies = [toys.tiny_model(family) for _ in range(2)]
    found, texts = chain(toys.tiny_model(family), copies, [(0, 1), (1, 3)])
    expected = torch.stack([toys.plain_logits(plain, text) for text in texts])
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT[family])


@pytest.mark.parametrize("spans", [[(0, 3)], [(0, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)]])
def test_so_it_is_for_every_partition(spans):
    plain = toys.tiny_model("gemma3")
    copies = [toys.tiny_model("gemma3") for _ in spans]
    found, texts = chain(toys.tiny_model("gemma3"), copies, spans)
    expected = torch.stack([toys.plain_logits(plain, text) for text in texts])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt-neox", "gemma2", "gemma4"])
def test_a_servers_blocks_come_from_the_disk_and_nothing_else_does(family, tmp_path):
    toys.tiny_model(family).save_pretrained(tmp_path / "model")
    files = find_language_model(str(tmp_path / "model"))
    blocks = load_blocks(files, 1, 3, dtype="float64")
    try:
        whole = Decoder(toys.tiny_model(family))
        assert all(each.is_meta for each in decoder_layers(blocks.model).parameters())
        assert blocks.model.get_input_embeddings().weight.is_meta
        hidden = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        mask = torch.ones(2, 5, 5, dtype=torch.bool).tril()
        positions = torch.arange(5).expand(2, -1)
        own = Blocks(whole.model, 1, 3, CPU)
        for span in (range(1, 3), range(2, 3)):
            expected = own.forward(hidden, positions, mask, span)
            torch.testing.assert_close(blocks.forward(hidden, positions, mask, span), expected)
            torch.testing.assert_close(
                blocks.step(hidden, positions, mask, blocks.new_cache(2, 1), span), expected
            )
    finally:
        blocks.close()


@pytest.mark.parametrize("how", [{}, {"bits": 8}, {"memory": 140_000}])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_gradient_is_that_of_the_whole_model(family, how, tmp_path):
    toys.tiny_model(family).save_pretrained(tmp_path / "model")
    files = find_language_model(str(tmp_path / "model"))
    blocks = load_blocks(files, 0, 3, dtype="float64", **how)
    try:
        if how.get("memory"):
            assert len(blocks.store.resident) < 3
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(2, 6, 32, dtype=torch.float64, generator=generator).requires_grad_(True)
        gradient = torch.randn(2, 6, 32, dtype=torch.float64, generator=generator)
        mask = torch.ones(2, 6, 6, dtype=torch.bool).tril()
        positions = torch.arange(6).expand(2, -1)
        reference = Blocks(toys.tiny_model(family), 0, 3, CPU)
        if how.get("bits"):
            store = WeightStore(QuantizedSource(DiskSource(pack_model(files, "float64")), 8), range(3))
            reference = Blocks(toys.tiny_model(family), 0, 3, CPU, store)
        with torch.enable_grad():
            out = reference._run(hidden, positions, reference._full_masks(positions, mask), range(3), None)
        (expected,) = torch.autograd.grad(out, hidden, gradient)
        found = blocks.backward(hidden.detach(), positions, mask, gradient, range(3))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert all(each.is_meta for each in decoder_layers(blocks.model).parameters())
    finally:
        blocks.close()


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("device", [0.0, 0.5, 1.0])
def test_a_placement_says_where_the_blocks_lie(bits, device, tmp_path):
    """The same object that blocks of prompts and a speculative target have."""
    files = find_language_model(str(save_toy(tmp_path / "toy", make_toy())))
    here = Shares(1, 0, 0)
    placement = Placement(4, 2, Shares(device, 0, 1 - device), here, here, weight_bits=bits)
    blocks = load_blocks(files, 1, 3, dtype="float64", placement=placement)
    source = DiskSource(pack_model(files, "float64"))
    store = WeightStore(source if bits is None else QuantizedSource(source, bits), range(3))
    whole = Blocks(make_toy(), 0, 3, CPU, store)
    try:
        hidden = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        mask, positions = torch.ones(2, 5, 5, dtype=torch.bool).tril(), torch.arange(5).expand(2, -1)
        expected = whole.forward(hidden, positions, mask, range(1, 3))
        torch.testing.assert_close(blocks.forward(hidden, positions, mask, range(1, 3)), expected)
        assert (blocks.store.counters.bytes_used > 0) == (device < 1)
        if bits is None:
            assert len(blocks.store.resident) == int(2 * device)
    finally:
        blocks.close()
        whole.close()


def held_bytes(blocks: Blocks) -> int:
    """All memory that blocks on a CPU have for weights: buffers, blocks in few bits, what stands around."""
    around = [each.untyped_storage() for each in blocks.model.parameters() if not each.is_meta]
    source, kept = blocks.store.source, []
    if isinstance(source, DequantizedSource):
        kept = [source._buffer, *source.stored._data.values()]
    return (
        blocks.store.counters.resident_peak_bytes
        + sum(each.nbytes() for each in around)
        + sum(each.nbytes for each in kept)
    )


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_keep_to_their_memory_and_say_the_same(family, bits, tmp_path):
    """From what one block takes to what all take: the more memory, the more stay."""
    toys.tiny_model(family).save_pretrained(tmp_path / "model")
    files = find_language_model(str(tmp_path / "model"))
    hidden = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask, positions = torch.ones(2, 5, 5, dtype=torch.bool).tril(), torch.arange(5).expand(2, -1)
    with pytest.raises(UserError, match=r"100 bytes of memory are too few .* give \d+ or more") as error:
        load_blocks(files, 0, 3, dtype="float64", bits=bits, memory=100)
    least = int(str(error.value).split()[-3])
    with pytest.raises(UserError, match=f"give {least} or more"):
        load_blocks(files, 0, 3, dtype="float64", bits=bits, memory=least - 1)
    whole = load_blocks(files, 0, 3, dtype="float64", bits=bits)
    try:
        expected, shares = whole.forward(hidden, positions, mask, range(3)), []
        for memory in range(least, whole.peak_bytes["device"] + least, 40_000):
            blocks = load_blocks(files, 0, 3, dtype="float64", bits=bits, memory=memory)
            try:
                found = blocks.forward(hidden, positions, mask, range(3))
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
                assert held_bytes(blocks) <= blocks.peak_bytes["device"] <= memory
                shares.append(blocks.weights.device)
            finally:
                blocks.close()
        assert shares[0] < shares[-1] == 1
    finally:
        whole.close()


@pytest.mark.parametrize("bits", [None, 4])
def test_what_a_gpu_has_no_room_for_is_in_ram_and_then_on_the_disk(bits, tmp_path):
    files = find_language_model(str(save_toy(tmp_path / "toy", make_toy(layers=6))))
    source = open_source(pack_model(files, "float64"), bits)
    block = padded(source.nbytes(0))
    stored = padded((source if bits is None else source.stored).nbytes(0))
    cases = [(6, 0, (6, 0)), (4, 2, (2, 2)), (2, 9, (0, 6)), (1, 1, (0, 1))]
    if bits is not None:  # a GPU needs room for blocks on their way only
        cases = [(4, 2, (2, 0)), (2, 9, (6, 0)), (1, 1, (1, 0))]
    for memory, ram, expected in cases:
        room = ram * stored + (0 if bits is None else source.buffer_bytes)
        placement, buffers = place_blocks(source, bits, memory * block, room)
        found = realise_weights(placement, source)
        assert (len(found.resident), len(found.in_ram)) == expected
        assert 1 <= buffers <= min(2, memory)


def test_a_slot_is_counted_as_it_is():
    blocks = Blocks(toys.tiny_model("llama"), 1, 3, CPU)
    assert blocks.slot_bytes == 2 * 2 * 8 * 8  # keys and values, two heads of 8 float64
    blocks = Blocks(toys.tiny_model("gpt2"), 0, 1, CPU)
    assert blocks.slot_bytes == 2 * 4 * 8 * 8


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_masks_are_no_larger_than_they_are_said_to_be(family):
    blocks = Blocks(toys.tiny_model(family), 0, 3, torch.device("cpu"))
    positions, mask = torch.arange(40).repeat(2, 1), torch.ones(2, 40, 40, dtype=torch.bool)
    made = blocks._full_masks(positions, mask)
    with torch.profiler.profile(profile_memory=True) as profile:
        blocks._full_masks(positions, mask)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    said = blocks.mask_bytes(2, 40, 40)
    assert sum(mask.nbytes for mask in made.values()) < said
    assert said <= peak <= said + 4 * positions.nbytes + 1024


def test_a_client_has_both_ends_of_a_model_with_pictures(tmp_path):
    model = toys.tiny_model("gemma3 with pictures", torch.float32)
    model.save_pretrained(tmp_path / "model")
    files = find_language_model(str(tmp_path / "model"))
    whole = load_without_layers(files, read_rest(pack_model(files)))
    found, texts = chain(whole, [toys.tiny_model("gemma3 with pictures", torch.float32)], [(0, 3)])
    expected = torch.stack([toys.plain_logits(model, text) for text in texts])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_blocks_of_layers_that_read_each_others_keys_are_refused(tmp_path):
    toys.tiny_model("gemma4 with shared keys").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not in parts"):
        load_blocks(find_language_model(str(tmp_path)), 0, 2)


def test_blocks_that_there_are_not_are_refused(tmp_path):
    files = find_language_model(str(save_toy(tmp_path / "toy", make_toy().float())))
    with pytest.raises(UserError, match="has blocks 0:3, not 2:4"):
        load_blocks(files, 2, 4)


def test_a_model_without_its_ends_lacks_nothing_else(tmp_path):
    toys.tiny_model("gpt2").save_pretrained(tmp_path / "model")
    files = find_language_model(str(tmp_path / "model"))
    rest = read_rest(pack_layers(files.folder, tmp_path / "packed"))
    model = load_without_layers(files, rest, dtype="float64", embeds=False)
    assert model.get_input_embeddings().weight.is_meta
    assert not model.transformer.wpe.weight.is_meta
    with pytest.raises(UserError, match=r"lack .*wpe"):
        load_without_layers(
            files, {n: t for n, t in rest.items() if "wpe" not in n}, dtype="float64", embeds=False
        )

import threading
from collections.abc import Collection

import decoder_toys as toys
import pytest
import torch
import transformers

from t2iprobe.errors import UserError
from t2iprobe.llm.engine import decoder as decoding
from t2iprobe.llm.engine.cache import RowCache
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.memory.packing import pack_layers, read_rest
from t2iprobe.llm.memory.sources import DiskSource
from t2iprobe.llm.memory.store import WeightStore
from t2iprobe.llm.models import decoder_layers, find_language_model, load_without_layers, name_tensors

# Gemma 2 takes its softmax in float32, whatever the model's dtype.
EXACT = dict.fromkeys(toys.FAMILIES, 1e-9) | {"gemma2": 1e-5}
PROMPTS = [toys.random_tokens(length, seed=length) for length in (9, 3, 14)]
NODES = 12


def run_tree(decoder: Decoder, prompts: list[torch.Tensor], first: int = 0) -> tuple[torch.Tensor, RowCache]:
    """Logits [B, nodes, V] of a random tree behind each prompt, and the cache in which they are pending."""
    tokens, trees = make_trees(len(prompts), first)
    cache, _ = decoder.prefill(prompts)
    ancestors = torch.stack([ancestors for ancestors, _ in trees])
    positions = torch.stack([len(text) + depths for text, (_, depths) in zip(prompts, trees, strict=True)])
    return decoder.forward(tokens, positions, ancestors, cache), cache


def make_trees(batch: int, first: int = 0) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    tokens = torch.stack([toys.random_tokens(NODES, seed=50 + first + row) for row in range(batch)])
    return tokens, [toys.random_tree(NODES, seed=first + row) for row in range(batch)]


def run_paths(model, prompts: list[torch.Tensor], first: int = 0) -> torch.Tensor:
    """The same logits from one plain forward for each node's path."""
    tokens, trees = make_trees(len(prompts), first)
    return torch.stack(
        [
            torch.stack([toys.plain_logits(model, torch.cat([text, row[seen]])) for seen in ancestors])
            for text, row, (ancestors, _) in zip(prompts, tokens, trees, strict=True)
        ]
    )


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_every_node_gets_the_logits_of_its_own_path(family):
    model = toys.tiny_model(family)
    logits, _ = run_tree(Decoder(model), PROMPTS)
    expected = run_paths(model, PROMPTS)
    assert logits.dtype == torch.float64
    assert expected.std() > 0.3  # large enough that a node too many or too few is seen
    torch.testing.assert_close(logits, expected, rtol=0, atol=EXACT[family])
    model.float()
    logits, _ = run_tree(Decoder(model), PROMPTS)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt-neox"])
def test_a_text_in_a_batch_equals_the_text_alone(family):
    decoder = Decoder(toys.tiny_model(family))
    together, _ = run_tree(decoder, PROMPTS)
    for row, text in enumerate(PROMPTS):
        alone, _ = run_tree(decoder, [text], first=row)
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=EXACT[family])


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_after_keeping_a_path_the_cache_is_that_of_the_longer_text(family):
    decoder = Decoder(toys.tiny_model(family, torch.float32))
    _, cache = run_tree(decoder, PROMPTS)
    tokens, trees = make_trees(len(PROMPTS))
    deepest = [ancestors[int(depths.argmax())].nonzero()[:, 0] for ancestors, depths in trees]
    assert any(path.tolist() != list(range(len(path))) for path in deepest)
    cache.keep(deepest)
    texts = [torch.cat([text, row[path]]) for text, row, path in zip(PROMPTS, tokens, deepest, strict=True)]
    fresh, _ = decoder.prefill(texts)
    assert cache.lengths == fresh.lengths == [len(text) for text in texts]
    for kept, expected in zip(cache._tensors(), fresh._tensors(), strict=True):
        for row, length in enumerate(cache.lengths):
            torch.testing.assert_close(kept[row, :, :length], expected[row, :, :length], rtol=0, atol=1e-4)
    # And the next round's tree, behind texts of other lengths, is right too.
    ancestors = torch.stack([seen for seen, _ in trees])
    positions = torch.stack([len(text) + depths for text, (_, depths) in zip(texts, trees, strict=True)])
    logits = decoder.forward(tokens, positions, ancestors, cache)
    torch.testing.assert_close(logits, run_paths(decoder.model, texts), rtol=0, atol=1e-4)


def test_a_tree_may_come_in_several_passes():
    decoder = Decoder(toys.tiny_model("gemma3"))
    expected, _ = run_tree(decoder, PROMPTS)
    tokens, trees = make_trees(len(PROMPTS))
    cache, _ = decoder.prefill(PROMPTS)
    parts = []
    for part in (slice(0, 1), slice(1, 5), slice(5, NODES)):
        mask = torch.stack([ancestors[part, : part.stop] for ancestors, _ in trees])
        positions = torch.stack(
            [len(text) + tree[1][part] for text, tree in zip(PROMPTS, trees, strict=True)]
        )
        parts.append(decoder.forward(tokens[:, part], positions, mask, cache))
        assert cache.pending == part.stop
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["qwen2 with windows", "mistral", "gemma2", "gemma3"])
def test_the_window_matters_in_these_tests(family):
    model = toys.tiny_model(family)
    wide = toys.tiny_model(family, sliding_window=50)
    assert (run_paths(model, PROMPTS[2:]) - run_paths(wide, PROMPTS[2:])).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_of_padding_are_finite_and_disturb_nobody(family):
    decoder = Decoder(toys.tiny_model(family, torch.float32))
    expected, _ = run_tree(decoder, PROMPTS)
    tokens, trees = make_trees(len(PROMPTS))
    mask = torch.zeros(len(PROMPTS), NODES + 3, NODES + 3, dtype=torch.bool)
    mask[:, :NODES, :NODES] = torch.stack([ancestors for ancestors, _ in trees])
    positions = torch.stack([len(text) + depths for text, (_, depths) in zip(PROMPTS, trees, strict=True)])
    pad = torch.zeros(len(PROMPTS), 3, dtype=torch.int64)
    for texts in (PROMPTS, [text[:0] for text in PROMPTS]):  # behind no text they see nothing at all
        cache, _ = decoder.prefill(texts)
        logits = decoder.forward(torch.cat([tokens, pad], 1), torch.cat([positions, pad], 1), mask, cache)
        assert logits.isfinite().all()
        if texts is PROMPTS:
            torch.testing.assert_close(logits[:, :NODES], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_prompt_in_chunks_and_in_parts_is_the_same(family, monkeypatch):
    decoder = Decoder(toys.tiny_model(family))
    whole, logits = decoder.prefill(PROMPTS)
    expected = torch.stack([toys.plain_logits(decoder.model, text) for text in PROMPTS])
    torch.testing.assert_close(logits, expected, rtol=0, atol=EXACT[family])
    monkeypatch.setattr(decoding, "CHUNK", 4)
    passes, heads = decoder.passes, []
    decoder.model.lm_head.register_forward_hook(lambda *call: heads.append(call[2].shape[1]))
    chunked, logits = decoder.prefill(PROMPTS)
    assert decoder.passes == passes + 4
    assert heads == [1]  # of the last chunk's last row alone
    torch.testing.assert_close(logits, expected, rtol=0, atol=EXACT[family])
    parts, _ = decoder.prefill([text[:2] for text in PROMPTS])
    parts, logits = decoder.prefill([text[2:] for text in PROMPTS], parts)
    torch.testing.assert_close(logits, expected, rtol=0, atol=EXACT[family])
    assert whole.lengths == chunked.lengths == parts.lengths == [len(text) for text in PROMPTS]


def test_an_empty_prompt_is_a_prompt():
    decoder = Decoder(toys.tiny_model("llama"))
    cache, logits = decoder.prefill([PROMPTS[0], PROMPTS[0][:0]])
    assert cache.lengths == [9, 0]
    assert logits.shape == (2, toys.VOCABULARY)
    cache, logits = decoder.prefill([PROMPTS[0][:0]])
    assert (cache.lengths, logits.shape) == ([0], (1, toys.VOCABULARY))


def test_only_the_rows_that_are_wanted_get_logits():
    decoder = Decoder(toys.tiny_model("gemma3"))
    all_rows, _ = run_tree(decoder, PROMPTS)
    tokens, trees = make_trees(len(PROMPTS))
    ancestors = torch.stack([seen for seen, _ in trees])
    positions = torch.stack([len(text) + depths for text, (_, depths) in zip(PROMPTS, trees, strict=True)])
    for keep in (0, 1, 5, NODES):
        cache, _ = decoder.prefill(PROMPTS)
        seen = []
        hook = decoder.model.lm_head.register_forward_hook(
            lambda *call, seen=seen: seen.append(call[2].shape[1])
        )
        logits = decoder.forward(tokens, positions, ancestors, cache, keep=keep)
        hook.remove()
        assert seen == ([keep] if keep else [])
        torch.testing.assert_close(logits, all_rows[:, NODES - keep :], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_context_ends_the_prompt_but_not_the_tree(family):
    decoder = Decoder(toys.tiny_model(family))
    assert decoder.context_length == toys.CONTEXT
    with pytest.raises(UserError, match="has 65 tokens: the model's context ends at 64"):
        decoder.prefill([toys.random_tokens(65), toys.random_tokens(3)])
    text = toys.random_tokens(62)
    cache, _ = decoder.prefill([text])
    with pytest.raises(UserError, match="context"):
        decoder.prefill([toys.random_tokens(3)], cache)
    assert cache.lengths == [62]
    chain = toys.random_tokens(1, 4)
    mask = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    logits = decoder.forward(chain, torch.arange(62, 66)[None], mask, cache)  # two nodes lie outside
    for node in range(2):
        expected = toys.plain_logits(decoder.model, torch.cat([text, chain[0, : node + 1]]))
        torch.testing.assert_close(logits[0, node], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_longrope_text_ends_where_all_positions_would_turn(family):
    border = 20
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope |= {"factor": 4.0, "original_max_position_embeddings": border}
    model = toys.tiny_model(family, rope_parameters=rope, original_max_position_embeddings=border)
    decoder = Decoder(model)
    assert decoder.context_length == border
    with pytest.raises(
        UserError, match=f"has 21 tokens: the model's context ends at {border}, where its longrope"
    ):
        decoder.prefill([toys.random_tokens(border + 1)])
    text = toys.random_tokens(border - 2)
    cache, _ = decoder.prefill([text, text[:3]])
    chain = toys.random_tokens(1, 4).expand(2, 4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool).tril()
    # Two nodes of the first text lie outside: they change no other row, and no key that is kept.
    positions = torch.arange(4) + torch.tensor([[border - 2], [3]])
    logits = decoder.forward(chain, positions, mask, cache)
    cache.keep([[0], [0, 1]])
    for row, (start, nodes) in enumerate(((text, 2), (text[:3], 4))):
        for node in range(nodes):
            expected = toys.plain_logits(model, torch.cat([start, chain[row, : node + 1]]))
            torch.testing.assert_close(logits[row, node], expected, rtol=0, atol=1e-9)
    logits = decoder.forward(chain[:, :1], torch.tensor([[border - 1], [5]]), mask[:, :1, :1], cache)
    expected = toys.plain_logits(model, torch.cat([text, chain[0, [0, 0]]]))
    torch.testing.assert_close(logits[0, 0], expected, rtol=0, atol=1e-9)


def test_facts_about_the_model():
    decoder = Decoder(toys.tiny_model("llama", torch.float32))
    assert (decoder.vocabulary, decoder.device, decoder.dtype) == (37, torch.device("cpu"), torch.float32)
    assert decoder.new_cache(2, 10).capacity == 10
    assert decoder.passes == 0
    decoder.prefill(PROMPTS)
    assert decoder.passes == 1


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.BloomConfig(vocab_size=37, hidden_size=32, n_layer=1, n_head=4), "positions"),
        (transformers.MambaConfig(vocab_size=37, hidden_size=32, num_hidden_layers=1), "positions"),
        (
            transformers.FalconConfig(
                vocab_size=37, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True
            ),
            "positions",
        ),
        (
            transformers.GPTNeoConfig(
                vocab_size=37, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["local"], 1]]
            ),
            "a mask of their own",
        ),
    ],
)
def test_models_that_would_be_wrong_are_refused(config, reason):
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=f"{config.model_type} models cannot verify trees: .*{reason}"):
        Decoder(model)


def test_layers_that_keep_a_state_are_refused():
    model = toys.tiny_model("llama")
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(UserError, match="linear_attention"):
        Decoder(model)


class ToyStore:
    """Layers that are held one at a time, and overwritten as soon as they are released."""

    def __init__(self, model, faulty: Collection[int] = ()) -> None:
        self.weights = [
            {name: tensor.clone() for name, tensor in layer.state_dict().items()}
            for layer in decoder_layers(model)
        ]
        self.layers = len(self.weights)
        self.faulty = set(faulty)
        self.held: dict[int, dict[str, torch.Tensor]] = {}
        self.order: list[int] = []

    def acquire(self, layer: int) -> dict[str, torch.Tensor]:
        if layer in self.faulty:
            raise OSError("the disk is gone")
        assert not self.held
        self.order.append(layer)
        self.held[layer] = {name: tensor.clone() for name, tensor in self.weights[layer].items()}
        return self.held[layer]

    def release(self, layer: int) -> None:
        for tensor in self.held.pop(layer, {}).values():
            tensor.fill_(float("nan"))


def empty_layers(model) -> None:
    """Take the weights away from a model's layers."""
    decoder_layers(model).to("meta")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "gpt-neox", "gpt2", "opt"])
def test_layers_from_a_store_compute_what_the_models_own_do(family):
    model = toys.tiny_model(family)
    expected = run_paths(model, PROMPTS)
    store = ToyStore(model)
    empty_layers(model)
    decoder = Decoder(model, store)
    for _ in range(2):
        store.order.clear()
        logits, _ = run_tree(decoder, PROMPTS)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
        assert store.order == [*range(store.layers)] * 2
        assert not store.held
        assert all(parameter.is_meta for parameter in decoder_layers(model).parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_from_the_disk_compute_what_the_models_own_do(family, tmp_path):
    model = toys.tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    packed = pack_layers(tmp_path / "model", tmp_path / "packed")
    files = find_language_model(str(tmp_path / "model"))
    empty = load_without_layers(files, read_rest(packed), dtype="float64")
    with WeightStore(DiskSource(packed), resident=[1]) as store:
        logits, _ = run_tree(Decoder(empty, store), PROMPTS)
        torch.testing.assert_close(logits, run_paths(model, PROMPTS), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", toys.AWKWARD)
def test_layers_from_the_disk_are_what_the_model_holds(family, tmp_path):
    model = toys.tiny_model(family, torch.float32)
    expected = run_paths(model, PROMPTS)
    model.save_pretrained(tmp_path / "model")
    files = find_language_model(str(tmp_path / "model"))
    packed = pack_layers(files.folder, tmp_path / "packed", None, lambda: name_tensors(files))
    empty = load_without_layers(files, read_rest(packed))
    initial = [layer.state_dict() for layer in decoder_layers(empty)]
    with WeightStore(DiskSource(packed), resident=[1]) as store:
        logits, _ = run_tree(Decoder(empty, store), PROMPTS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    for layer, before in zip(decoder_layers(empty), initial, strict=True):  # buffers are given back, too
        for name, each in layer.state_dict().items():
            assert each.is_meta or torch.equal(each, before[name])


def test_a_store_of_another_dtype_is_cast():
    model = toys.tiny_model("llama", torch.float32)
    model.to(torch.bfloat16).float()  # weights that bfloat16 holds exactly
    expected = run_paths(model, PROMPTS)
    store = ToyStore(model)
    store.weights = [{name: each.bfloat16() for name, each in layer.items()} for layer in store.weights]
    empty_layers(model)
    logits, _ = run_tree(Decoder(model, store), PROMPTS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


class Interrupted(BaseException):
    """Such as KeyboardInterrupt, which is no Exception."""


@pytest.mark.parametrize("where", ["layer", "store"])
@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
def test_an_exception_reaches_the_caller_and_the_next_pass_is_right(where, error):
    model = toys.tiny_model("llama")
    expected = run_paths(model, PROMPTS)
    store = ToyStore(model)
    empty_layers(model)
    decoder = Decoder(model, store)
    _, cache = run_tree(decoder, PROMPTS)
    cache.crop([len(text) for text in PROMPTS])
    passes = decoder.passes

    def fail(*_):
        raise error("broken")

    if where == "layer":
        hook = decoder_layers(model)[1].mlp.register_forward_pre_hook(fail)
    else:
        acquire, store.acquire = store.acquire, lambda layer: fail() if layer == 1 else acquire(layer)
    tokens, trees = make_trees(len(PROMPTS))
    ancestors = torch.stack([seen for seen, _ in trees])
    positions = torch.stack([len(text) + depths for text, (_, depths) in zip(PROMPTS, trees, strict=True)])
    with pytest.raises(error, match="broken"):
        decoder.forward(tokens, positions, ancestors, cache)
    assert not store.held
    assert all(parameter.is_meta for parameter in decoder_layers(model).parameters())
    assert (cache.pending, decoder.passes) == (0, passes)
    if where == "layer":
        hook.remove()
    else:
        store.acquire = acquire
    logits = decoder.forward(tokens, positions, ancestors, cache)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def test_a_store_of_another_model_is_refused():
    model, longer = toys.tiny_model("llama"), toys.tiny_model("llama", num_hidden_layers=4)
    with pytest.raises(UserError, match="the model has 3 layers and its weight store 4"):
        Decoder(model, ToyStore(longer))
    store = ToyStore(model)
    del store.weights[1]["mlp.up_proj.weight"]
    decoder = Decoder(model, store)
    with pytest.raises(UserError, match="layer 1 lacks mlp.up_proj.weight"):
        decoder.prefill(PROMPTS)
    assert not store.held


def test_decoders_in_two_threads_do_not_meet():
    model = toys.tiny_model("llama")
    expected = run_paths(model, PROMPTS)
    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(run_tree(Decoder(model), PROMPTS)[0])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def test_the_model_still_generates_on_its_own():
    model = toys.tiny_model("llama", torch.float32)
    plain = model.generate(PROMPTS[0][None], max_new_tokens=8, do_sample=False)
    decoder = Decoder(model)
    run_tree(decoder, PROMPTS)
    assert torch.equal(model.generate(PROMPTS[0][None], max_new_tokens=8, do_sample=False), plain)

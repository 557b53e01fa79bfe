"""Gradients through real servers are the local ones, whoever dies in between; and what they teach."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from language_toys import make_toy, write_plainly
from swarm_toys import Servers

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import pack_model
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.engine.generation import generate
from t2iprobe.llm.memory.packing import read_rest
from t2iprobe.llm.models import find_language_model, load_tokenizer, load_without_layers
from t2iprobe.llm.swarm.blocks import Blocks, Ends, load_blocks
from t2iprobe.llm.swarm.client import load_swarm_engine, tune_soft_prompt
from t2iprobe.llm.swarm.registry import ModelKey
from t2iprobe.llm.swarm.session import Settings, Swarm
from t2iprobe.llm.swarm.taught import Adapters, SoftPrompt, load_taught, save_taught
from t2iprobe.llm.swarm.training import LocalChain, Rows, SwarmChain, run_blocks
from t2iprobe.llm.swarm.transport import Node
from t2iprobe.llm.swarm.tuning import Example, Tuning, example_loss, read_examples, tune

pytest.importorskip("hivemind")

BLOCKS = 6
QUICK = Settings(stall_seconds=10.0, recover_seconds=25.0, ban_seconds=4.0, ping_seconds=2.0)
EXAMPLES = [
    Example(torch.tensor([5, 9, 14, 3, 22, 8, 1]), 2),
    Example(torch.tensor([6, 30, 17, 11]), 1),
    Example(torch.tensor([5, 7, 9, 21, 13, 33, 25, 12, 1]), 4),
]


@pytest.fixture(scope="module")
def served(lasting: Servers):
    first = lasting.start("0:2", dtype="float32")
    return [first, *lasting.start_many(["2:5", "4:6"], [first.address], dtype="float32")]


def swarm_chain(toy, address: str, dtype: str = "float32") -> SwarmChain:
    files = find_language_model(str(toy))
    return SwarmChain(Swarm(Node([address]), ModelKey.of(files, pack_model(files, dtype)), QUICK))


def make_ends(toy) -> Ends:
    files = find_language_model(str(toy))
    whole = load_without_layers(files, read_rest(pack_model(files, "float32")), dtype="float32")
    return Ends(whole, Decoder(whole).windows)


def plain_gradients(prompt: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Loss and gradient by Transformers' own forward over the whole model, one example at a time."""
    model = make_toy(layers=BLOCKS).float()
    rows = prompt.clone().requires_grad_(True)
    loss = torch.zeros(())
    for each in EXAMPLES:
        hidden = torch.cat([rows, model.model.embed_tokens(each.tokens)])[None]
        logits = model(inputs_embeds=hidden).logits[0, len(rows) :]
        targets = each.tokens[each.prompt :]
        own = logits[each.prompt - 1 : len(each.tokens) - 1]
        loss = loss + torch.nn.functional.cross_entropy(own, targets, reduction="sum")
    loss.backward()
    return float(loss.detach()), rows.grad


def start_prompt() -> torch.Tensor:
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 0.3


def test_gradients_through_three_servers_are_those_of_the_whole_model(toy, served):
    chain = swarm_chain(toy, served[0].address)
    with chain.swarm.node:
        expected_loss, expected = plain_gradients(start_prompt())
        prompt = start_prompt().requires_grad_(True)
        loss, count = example_loss(make_ends(toy), chain, EXAMPLES, prompt)
        loss.backward()
        assert count == 5 + 3 + 5
        assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-5)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(prompt.grad, expected, rtol=1e-4, atol=1e-4)
        assert chain.swarm.counters.reroutes == 0


def test_adapters_between_spans_get_the_gradients_of_plain_autograd(toy, served):
    chain, generator = swarm_chain(toy, served[0].address), torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 5, 32, generator=generator)
    positions, mask = torch.arange(5).expand(2, -1), torch.ones(2, 5, 5, dtype=torch.bool).tril()
    weights = torch.randn(2, 5, 32, generator=generator)
    found = []
    with chain.swarm.node:
        for kind in ("swarm", "plain"):
            adapters = Adapters(32, 2, [0, 3], torch.float32, seed=2)
            for up in adapters.up:
                up.data.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
            blocks = Blocks(make_toy(layers=BLOCKS).float(), 0, BLOCKS, torch.device("cpu"))
            masks = blocks._full_masks(positions, mask)
            state = hidden
            for first, last in ((0, 3), (3, 6)):
                state = adapters(state, first)
                if kind == "swarm":
                    state = run_blocks(chain, Rows(state, positions, mask), first, last)
                else:
                    state = blocks._run(state, positions, masks, range(first, last), None)
            (state * weights).sum().backward()
            found.append([parameter.grad for parameter in adapters.parameters()])
    for one, two in zip(*found, strict=True):
        assert two.abs().max() > 1e-3
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_server_that_dies_between_forward_and_backward_changes_no_gradient(servers, toy):
    anchor = servers.start("0:1", dtype="float32")
    pool = servers.start_many(["0:3", "3:6", "0:4", "4:6", "2:6"], [anchor.address], dtype="float32")
    chain = swarm_chain(toy, anchor.address)
    with chain.swarm.node:
        used: set[str] = set()
        send = chain._send

        def watched(rows, hop, *gradient):
            used.add(hop.peer)
            return send(rows, hop, *gradient)

        chain._send = watched
        prompt = start_prompt().requires_grad_(True)
        loss, _ = example_loss(make_ends(toy), chain, EXAMPLES, prompt)
        victim = next(each for each in pool if each.peer in used and each.peer != anchor.peer)
        victim.send(signal.SIGKILL)
        loss.backward()
        torch.testing.assert_close(prompt.grad, plain_gradients(start_prompt())[1], rtol=1e-4, atol=1e-4)
        assert chain.swarm.counters.reroutes >= 1
        # And the next step goes on without it.
        again = start_prompt().requires_grad_(True)
        example_loss(make_ends(toy), chain, EXAMPLES, again)[0].backward()
        torch.testing.assert_close(again.grad, prompt.grad, rtol=1e-4, atol=1e-4)


def write_examples(path, count: int = 24):
    """Texts of one style: a letter, then always the same ending."""
    rows = [{"prompt": f"{chr(97 + n % 20)}:", "text": f"{chr(97 + n % 7)}xyz."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_taught_through_the_swarm_is_what_is_taught_here(toy, served, tmp_path):
    examples = write_examples(tmp_path / "examples.jsonl")
    how = Tuning(rows=4, epochs=3, batch=12, learning_rate=0.05)
    local, remote = (
        tune_soft_prompt(
            str(toy),
            examples,
            tmp_path / f"{len(peers)}.safetensors",
            peers,
            how=how,
            dtype="float32",
            settings=QUICK,
        )
        for peers in ([], [served[0].address])
    )
    assert local["held_out_loss_after"] < 0.9 * local["held_out_loss_before"]
    for one, two in zip(local["losses"], remote["losses"], strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    assert remote["round_trips"] > 0
    # The swarm writes with it: what a plain model writes behind these rows.
    prompt = torch.tensor([7, 9, 20])
    with load_swarm_engine(
        str(toy), [served[0].address], "none", dtype="float32", soft_prompt=tmp_path / "1.safetensors"
    ) as engine:
        found = generate(engine.target, None, [prompt], max_new_tokens=8)[0].token_ids
        model, rows = make_toy(layers=BLOCKS).float(), engine.target.taught.prompt
        text, expected = prompt, []
        for _ in range(8):
            hidden = torch.cat([rows, model.model.embed_tokens(text)])[None]
            expected.append(int(model(inputs_embeds=hidden).logits[0, -1].argmax()))
            text = torch.cat([text, torch.tensor(expected[-1:])])
        assert found == expected
        assert engine.target.context_length == 256 - 4


def test_adapters_lower_the_loss_too(toy):
    files = find_language_model(str(toy))
    blocks = load_blocks(files, 0, BLOCKS, dtype="float32")
    try:
        examples = [Example(torch.tensor([5 + n, 31, 32, 33, 1]), 1) for n in range(10)]
        how = Tuning(rows=1, rank=2, borders=[0, 3], epochs=12, batch=8, learning_rate=0.02)
        _, adapters, history = tune(make_ends(toy), LocalChain(blocks), examples, how)
        assert adapters is not None
        assert all(up.abs().max() > 0 for up in adapters.up)
        assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
        assert history[-1]["held_out_loss"] < history[0]["held_out_loss"]
        with pytest.raises(UserError, match="no block 6"):
            tune(make_ends(toy), LocalChain(blocks), examples, Tuning(rank=1, borders=[6]))
        with pytest.raises(UserError, match="two or more"):
            tune(make_ends(toy), LocalChain(blocks), examples[:1], Tuning())
    finally:
        blocks.close()


def test_examples_that_are_none_are_told_with_their_line(toy, tmp_path):
    tokenizer = load_tokenizer(find_language_model(str(toy)))
    path = tmp_path / "examples.jsonl"
    path.write_text('{"text": "abc"}\n\n{"prompt": "a:", "text": "b"}\n')
    found = read_examples(path, tokenizer)
    assert [(each.tokens.tolist(), each.prompt) for each in found] == [
        ([0, 6, 7, 8, 1], 1),
        ([6, 5, 7, 1], 2),
    ]
    path.write_text('\ufeff{"prompt": "a\u2028:", "text": "b"}\n', encoding="utf-8")
    (found,) = read_examples(path, tokenizer)
    assert found.tokens.tolist() == [6, 2, 5, 7, 1]
    for line in ('{"prompt": "a"}', "[]", "nonsense", '{"text": 7}', '{"text": "  "}'):
        path.write_text(f'{{"text": "abc"}}\n{line}\n')
        with pytest.raises(UserError, match="line 2: write"):
            read_examples(path, tokenizer)
    path.write_text('{"text": "abc", "prompt": "\\ud800"}\n')
    with pytest.raises(UserError, match="line 1: half of a surrogate pair"):
        read_examples(path, tokenizer)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no examples"):
        read_examples(path, tokenizer)


def write_with(model, adapters: Adapters, rows: torch.Tensor, prompt: torch.Tensor, count: int) -> list[int]:
    """What a whole model writes behind a soft prompt, with hooks that change what enters its layers."""
    hooks = [
        model.model.layers[border].register_forward_pre_hook(
            lambda _, args, border=border: (adapters(args[0], border), *args[1:])
        )
        for border in adapters.borders
    ]
    text = prompt
    for _ in range(count):
        hidden = torch.cat([rows, model.model.embed_tokens(text)])[None]
        text = torch.cat([text, model(inputs_embeds=hidden).logits[0, -1:].argmax(-1)])
    for hook in hooks:
        hook.remove()
    return text[len(prompt) :].tolist()


def test_adapters_are_taught_through_the_swarm_and_written_with(toy, served, tmp_path):
    """LoRA before each span: the losses of a whole model, then its text, also when trees are verified."""
    examples, out = write_examples(tmp_path / "examples.jsonl"), tmp_path / "lora.safetensors"
    how = Tuning(rows=0, rank=2, epochs=2, batch=12, learning_rate=0.02)
    remote = tune_soft_prompt(
        str(toy), examples, out, [served[0].address], how=how, dtype="float32", settings=QUICK
    )
    borders = remote["borders"]
    assert borders[0] == 0
    assert len(borders) >= 3  # no server holds all, and none both ends of a pair's
    assert remote["held_out_loss_after"] < remote["held_out_loss_before"]
    local = tune_soft_prompt(
        str(toy), examples, tmp_path / "here", how=replace(how, borders=borders), dtype="float32"
    )
    for one, two in zip(local["losses"], remote["losses"], strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    prompt, model = torch.tensor([7, 9, 20, 7, 9]), make_toy(layers=BLOCKS).float()
    with load_swarm_engine(
        str(toy), [served[0].address], "lookup", dtype="float32", soft_prompt=out, settings=QUICK
    ) as engine:
        adapters = engine.target.taught.adapters
        assert all(up.abs().max() > 1e-3 for up in adapters.up)
        found = generate(engine.target, engine.draft, [prompt], max_new_tokens=10)[0].token_ids
        assert found == write_with(model, adapters, torch.zeros(0, 32), prompt, 10)
        assert found != write_plainly(model, prompt, 10)


def test_a_text_with_adapters_and_rows_survives_a_server(servers, toy, tmp_path):
    """Borders inside a server's span cut it in two; what was read again is adapted, too."""
    first = servers.start("0:6", dtype="float32")
    pool = [first, servers.start("0:6", first.address, dtype="float32")]
    rows, adapters = start_prompt(), Adapters(32, 2, [0, 4], torch.float32, seed=2)
    for up in adapters.up:
        up.data.normal_(std=0.2, generator=torch.Generator().manual_seed(3))
    files, out = find_language_model(str(toy)), tmp_path / "both.safetensors"
    key = ModelKey.of(files, pack_model(files, "float32"))
    save_taught(out, SoftPrompt(rows), adapters, key, {})
    prompt = torch.tensor([7, 9, 20])
    addresses = [each.address for each in pool]
    with load_swarm_engine(
        str(toy), addresses, "none", dtype="float32", soft_prompt=out, settings=QUICK
    ) as engine:
        written: list[int] = []

        def kill(_: int, new) -> None:
            written.extend(new)
            if len(written) == 4:
                spans.extend((link.hop.first, link.hop.last) for link in caches[0]._links)
                used = caches[0]._links[0].hop.peer
                next(each for each in pool if each.peer == used).send(signal.SIGKILL)

        caches, spans, make = [], [], engine.target.new_cache
        engine.target.new_cache = lambda *args: caches.append(make(*args)) or caches[-1]
        expected = write_with(make_toy(layers=BLOCKS).float(), adapters, rows, prompt, 10)
        found = generate(engine.target, None, [prompt], max_new_tokens=10, on_tokens=kill)[0].token_ids
        assert found == expected
        assert spans == [(0, 4), (4, 6)]
        assert engine.target.swarm.counters.reroutes >= 1


def test_a_soft_prompt_of_another_model_is_refused(toy, served, tmp_path):
    other = tmp_path / "no.safetensors"
    other.write_bytes(b"nothing")
    with pytest.raises(UserError, match="nothing is taught"):
        tune(make_ends(toy), None, EXAMPLES, Tuning(rows=0))
    save_taught(other.with_name("another"), SoftPrompt(start_prompt()), None, ModelKey("x", "", None, 6), {})
    with pytest.raises(UserError, match="was taught to"):
        load_taught(other.with_name("another"), ModelKey("y", "", None, 6, "toy"))
    with pytest.raises(UserError, match="is no soft prompt"):
        load_swarm_engine(str(toy), [served[0].address], "none", dtype="float32", soft_prompt=other)

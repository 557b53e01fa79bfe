"""Text through real servers: what one process writes, whoever dies, stalls or lies on the way."""

import collections
import itertools
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from language_toys import VOCABULARY, blur, make_toy, save_toy, write_plainly
from scipy.stats import chisquare
from swarm_toys import Server, Servers, wait_until

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import pack_model
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.engine.drafts import LookupDraft, ModelDraft
from t2iprobe.llm.engine.generation import Trees, generate
from t2iprobe.llm.engine.processing import Sampling
from t2iprobe.llm.memory.placement import Placement, Shares
from t2iprobe.llm.models import find_language_model
from t2iprobe.llm.swarm.client import load_swarm_engine
from t2iprobe.llm.swarm.frames import Frame, Kind, Limits, encode_frame
from t2iprobe.llm.swarm.routing import Hop
from t2iprobe.llm.swarm.session import Counters, Settings

pytest.importorskip("hivemind")

BLOCKS = 6
PROMPT = torch.tensor([7, 9, 20, 11, 7, 9, 20, 15, 8])
COUNT = 24
QUICK = Settings(stall_seconds=10.0, recover_seconds=25.0, ban_seconds=4.0, ping_seconds=2.0)
STALLS = replace(QUICK, stall_seconds=3.0)  # for servers that stall


@pytest.fixture(scope="module")
def plain():
    return write_plainly(make_toy(layers=BLOCKS), PROMPT, COUNT)


def slow(value):
    """A case of a test that takes long, together with the others."""
    return pytest.param(value, marks=pytest.mark.slow)


class Client:
    """A client, and what its target did."""

    def __init__(self, toy, *peers: str, draft: str = "none", settings: Settings = QUICK, **how) -> None:
        self.engine = load_swarm_engine(str(toy), peers, draft, dtype="float64", settings=settings, **how)
        self.target = self.engine.target

    @property
    def counters(self):
        return self.target.swarm.counters

    def write(
        self, prompt=PROMPT, count: int = COUNT, before: Callable[[int], None] | None = None, **how
    ) -> list[int]:
        """Write greedily; `before` is called with the number of each step before it runs."""
        prompts = prompt if isinstance(prompt, list) else [prompt]
        steps, forward = [0], self.target.forward

        def counted(*args, **kwargs):
            if before is not None:
                before(steps[0])
            steps[0] += 1
            return forward(*args, **kwargs)

        self.target.forward = counted
        try:
            found = generate(self.target, self.engine.draft, prompts, max_new_tokens=count, **how)
        finally:
            self.target.forward = forward
        return [made.token_ids for made in found] if isinstance(prompt, list) else found[0].token_ids

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.engine.close()


@pytest.fixture(scope="module")
def three(lasting: Servers) -> list[Server]:
    """Three servers that stay, with borders of all kinds."""
    first = lasting.start("0:2")
    return [first, *lasting.start_many(["2:5", "4:6"], [first.address])]


@pytest.fixture(scope="module")
def client(toy, three):
    with Client(toy, three[0].address) as found:
        yield found


def test_three_servers_write_what_one_process_does(client, plain):
    before = client.counters.round_trips
    assert client.write() == plain
    assert client.counters.round_trips - before == 3 * COUNT  # one question to each server a token
    assert client.counters.reroutes == 0


def test_prompts_of_a_batch_end_at_different_lengths(client):
    model = make_toy(layers=BLOCKS)
    prompts = [PROMPT, PROMPT[:3], torch.tensor([30, 31, 32, 33, 34])]
    expected = [write_plainly(model, prompt, 12) for prompt in prompts]
    eos = expected[1][4]
    cut = [each[: each.index(eos) + 1] if eos in each else each for each in expected]
    assert client.write(prompts, 12, eos_token_ids=[eos]) == cut
    assert client.write(prompts, 12) == expected


@pytest.mark.parametrize("growth", ["best-first", "chain", "optimal"])
def test_a_tree_is_verified_with_one_question_to_each_server(client, plain, growth):
    draft = ModelDraft(Decoder(make_toy(layers=BLOCKS)))  # always right: an upper bound
    before = client.counters.round_trips
    found = generate(client.target, draft, [PROMPT], max_new_tokens=COUNT, trees=Trees(growth, 24, depth=8))[
        0
    ]
    assert found.token_ids == plain
    assert client.counters.round_trips - before == 3 * found.target_passes
    assert found.target_passes < COUNT / 3


def test_a_draft_that_is_often_wrong_changes_nothing(client, plain):
    found = generate(client.target, LookupDraft(VOCABULARY), [PROMPT], max_new_tokens=COUNT)[0]
    assert found.token_ids == plain


def test_sampled_text_has_the_targets_own_distribution(client):
    """Three tokens of many prompts at once, by their joint distribution; a draft is right now and then."""
    model, rows, top, count = make_toy(layers=BLOCKS), 400, 2, 3
    draft = ModelDraft(Decoder(blur(make_toy(layers=BLOCKS))))
    sampling = Sampling(temperature=1.0, top_k=top)
    found = generate(
        client.target, draft, [PROMPT] * rows, max_new_tokens=count, sampling=sampling,
        trees=Trees("best-first", 4),
    )  # fmt: skip
    seen = collections.Counter(tuple(made.token_ids) for made in found)
    expected = {(): float(rows)}
    for _ in range(count):
        longer = {}
        for text, share in expected.items():
            logits = model(torch.cat([PROMPT, torch.tensor(text, dtype=torch.int64)])[None]).logits[0, -1]
            values, tokens = logits.topk(top)
            for token, p in zip(tokens.tolist(), values.softmax(0).tolist(), strict=True):
                longer[(*text, token)] = share * p
        expected = longer
    assert set(seen) <= set(expected)
    likely = [text for text, share in expected.items() if share >= 5]
    assert len(likely) >= 4
    counts, awaited = [seen[text] for text in likely], [expected[text] for text in likely]
    counts.append(rows - sum(counts))
    awaited.append(rows - sum(awaited))
    if awaited[-1] < 1e-9:
        assert counts.pop() == 0
        awaited.pop()
    assert chisquare(counts, awaited).pvalue > 1e-3


@pytest.mark.slow
def test_any_partition_of_the_blocks_writes_what_one_process_does(servers, toy, plain, monkeypatch):
    """All ways to cut six blocks into up to three spans, a process for each; greedy and sampled."""
    first = servers.start("0:6")
    pool = [first, *servers.start_many(["0:6", "0:6"], [first.address])]
    sampling, own, count = Sampling(temperature=1.0, seed=5), Decoder(make_toy(layers=BLOCKS)), 6
    sampled = generate(own, None, [PROMPT], max_new_tokens=count, sampling=sampling)[0].token_ids
    assert sampled != plain[:count]
    with Client(toy, first.address) as client:
        swarm, partitions = client.target.swarm, 0
        wait_until(lambda: swarm.refresh() or len(swarm.servers) == 3)
        for cuts in itertools.chain.from_iterable(
            itertools.combinations(range(1, BLOCKS), n) for n in range(3)
        ):
            spans = itertools.pairwise([0, *cuts, BLOCKS])
            hops = [Hop(server.peer, *span) for server, span in zip(pool, spans, strict=False)]
            monkeypatch.setattr(swarm, "route", lambda *_, hops=hops: hops)
            before = client.counters.round_trips
            assert client.write(count=count) == plain[:count]
            assert client.write(count=count, sampling=sampling) == sampled
            assert client.counters.round_trips - before == 2 * count * len(hops)
            partitions += 1
        assert partitions == 1 + 5 + 10
        assert client.counters.reroutes == 0


@pytest.mark.slow
def test_servers_whose_blocks_are_on_the_disk_hold_less_and_write_the_same(servers, tmp_path):
    """By a budget, and by a placement; what their processes hold is measured."""
    config = make_toy(layers=4).config
    config.intermediate_size = 12_000
    torch.manual_seed(0)
    model = type(make_toy())(config).double().eval().requires_grad_(False)
    servers.model = save_toy(tmp_path / "wide", model)
    pack_model(find_language_model(str(servers.model)), "float64")  # so that no server does
    layer = sum(each.nbytes for each in model.model.layers[0].parameters())
    on_disk, here = Shares(0, 0, 1), Shares(1, 0, 0)
    full = servers.start("0:4")
    budget = servers.start("0:4", full.address, memory=int(1.5 * layer))
    placed = servers.start("0:4", full.address, placement=Placement(1, 1, on_disk, here, here))
    assert full.resident_bytes() - budget.resident_bytes() > 2 * layer  # three, but for noise
    assert full.resident_bytes() - placed.resident_bytes() > layer  # it has two buffers
    expected = write_plainly(model, PROMPT, 4)
    for server in (budget, placed):
        with Client(servers.model, full.address, settings=replace(QUICK, ban_seconds=60.0)) as client:
            for other in {full.peer, budget.peer, placed.peer} - {server.peer}:
                client.target.swarm.ban(other)
            assert client.write(count=4) == expected
            assert client.counters.round_trips == 4


def test_eight_bits_halve_the_bytes_and_say_the_same(toy, three, client, plain):
    client.target.swarm.counters = full = Counters()
    client.write()
    with Client(toy, three[0].address, settings=Settings(eight_bits=True)) as other:
        found, eight = other.write(), other.counters
        assert eight.round_trips == full.round_trips
        assert eight.sent_bytes < 0.75 * full.sent_bytes  # of a toy's hidden states of 32 numbers
        assert eight.received_bytes < 0.5 * full.received_bytes
        same = sum(one == two for one, two in zip(found, plain, strict=True))
        assert same >= COUNT // 4  # a toy of random weights: not a claim about quality


def test_a_pass_that_no_frame_holds_goes_in_parts(toy, three, plain):
    with Client(toy, three[0].address) as other:
        other.target.swarm.node.limits = Limits(body_bytes=4 * 5 * 32 * 8)  # four times five rows
        assert other.write() == plain
        assert other.counters.round_trips == 3 * (COUNT + 1)  # nine tokens of the prompt, in two parts
        found = generate(other.target, LookupDraft(VOCABULARY), [PROMPT], max_new_tokens=COUNT)[0]
        assert found.token_ids == plain


def test_caches_are_given_back(toy, three):
    from t2iprobe.llm.swarm.registry import find_servers

    with Client(toy, three[0].address) as other:
        other.write(count=3)
        swarm = other.target.swarm

        def sessions() -> list[tuple[int, int]]:
            servers = find_servers(swarm.node, swarm.key).values()
            return [(each.sessions, each.cache_bytes - each.cache_bytes_left) for each in servers]

        wait_until(lambda: sessions() == [(0, 0)] * 3)


def test_a_simulated_round_trip_takes_its_time(toy, three):
    with Client(toy, three[0].address, settings=Settings(delay_seconds=0.1)) as other:
        began = time.perf_counter()
        other.write(count=2)
        assert time.perf_counter() - began > 0.1 * 3 * 2


# -- servers that die, stall and lie -------------------------------------------------------------------


def start_pairs(servers: Servers, *spans: str) -> list[Server]:
    """A server that stays and holds nothing that is needed, and one for each span."""
    anchor = servers.start("0:1")
    return [anchor, *servers.start_many(spans, [anchor.address])]


def serving(client: Client, servers: list[Server], block: int) -> Server:
    """The server that computes a block for the session that runs."""
    (cache,) = [ref() for ref in client.caches if ref() is not None]
    peer = next(link.hop.peer for link in cache._links if link.hop.first <= block < link.hop.last)
    return next(server for server in servers if server.peer == peer)


@pytest.fixture
def watch(monkeypatch):
    """Lets a client tell which cache it uses."""
    import weakref

    def start(client: Client) -> Client:
        client.caches = []
        make = client.target.new_cache

        def new_cache(*args):
            cache = make(*args)
            client.caches.append(weakref.ref(cache))
            return cache

        client.target.new_cache = new_cache
        return client

    return start


@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGSTOP)])
def test_a_server_that_goes_is_replaced_at_any_step(servers, toy, plain, watch, number):
    """At the first, a middle and the last step: three servers lost, one after another."""
    pool = start_pairs(servers, "0:6", "0:3", "3:6", "0:6", "2:6", "0:4")
    settings = STALLS if number == signal.SIGSTOP else QUICK
    with watch(Client(toy, pool[0].address, settings=settings)) as client:
        at = {0: 4, 11: 1, COUNT - 1: 5}
        lost, positions = [], []

        def hit(step: int) -> None:
            if step not in at:
                return
            if step == 0:
                client.target.swarm.refresh()
                hop = client.target.swarm.route(0, BLOCKS, 1)[-1]
                victim = next(each for each in pool if each.peer == hop.peer)
            else:
                victim = serving(client, pool, at[step])
            victim.send(number)
            lost.append(victim)
            if step:  # it may hold two spans of the chain
                spans = sum(link.hop.peer == victim.peer for link in client.caches[0]()._links)
                positions.extend([len(PROMPT) + step - 1] * spans)

        assert client.write(before=hit) == plain
        assert len({each.peer for each in lost}) == 3
        counters = client.counters
        assert counters.reroutes >= 2
        assert 0 < counters.recovery_seconds < 60
        # What was read again is what the text was, once for each span that was lost in its midst.
        assert counters.replayed_tokens >= sum(positions)
        if number == signal.SIGKILL:
            assert counters.replayed_tokens == sum(positions)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_two_at_once_and_the_replacement_too(servers, toy, plain, watch, number):
    # A route may leave 0:6 in the middle for a faster 3:6: three of those that hold block 5 may be lost.
    pool = start_pairs(servers, "0:3", "3:6", "0:3", "3:6", "0:6", "3:6")
    settings = STALLS if number == signal.SIGSTOP else QUICK
    with watch(Client(toy, pool[0].address, settings=settings)) as client:
        lost = []

        def hit(step: int) -> None:
            if step == 8:
                lost.extend({serving(client, pool, block).peer for block in (0, 5)})
                for each in pool:
                    if each.peer in lost:
                        each.send(number)
            if step == 9:
                victim = serving(client, pool, 5)
                assert victim.peer not in lost
                lost.append(victim.peer)
                victim.send(number)

        assert client.write(before=hit) == plain
        assert client.counters.reroutes >= 2


def test_a_replacement_that_dies_while_it_reads_again_is_replaced(servers, toy, plain, watch, monkeypatch):
    pool = start_pairs(servers, "0:6", "0:6", "0:6")
    from t2iprobe.llm.swarm import session

    with watch(Client(toy, pool[0].address)) as client:
        replays, replay = [], session.SwarmCache._replay

        def fatal(self, links):
            if self._history.lengths[0] and not replays:
                replays.append(links[0].hop.peer)
                next(each for each in pool if each.peer == links[0].hop.peer).send(signal.SIGKILL)
            replay(self, links)

        monkeypatch.setattr(session.SwarmCache, "_replay", fatal)

        def hit(step: int) -> None:
            if step == 5:
                serving(client, pool, 3).send(signal.SIGKILL)

        assert client.write(before=hit) == plain
        assert replays
        assert client.counters.reroutes == 1


@pytest.mark.slow
def test_a_server_that_joins_late_with_other_borders_saves_the_text(servers, toy, plain, watch):
    pool = start_pairs(servers, "1:4", "3:6")
    settings = replace(QUICK, recover_seconds=120.0)  # on a busy machine processes begin slowly
    with watch(Client(toy, pool[0].address, settings=settings)) as client:

        def hit(step: int) -> None:
            if step == 6:
                serving(client, pool, 2).send(signal.SIGKILL)
                # Nobody serves blocks 1 and 2 until these two come.
                threading.Thread(target=lambda: servers.start_many(["0:2", "2:5"], [pool[0].address])).start()

        assert client.write(before=hit) == plain
        assert client.counters.reroutes == 1
        assert client.counters.replayed_tokens == len(PROMPT) + 5


@pytest.mark.parametrize("history_bytes", [0, slow(1 << 30)])
def test_inputs_that_are_not_kept_are_computed_again(servers, toy, plain, watch, history_bytes):
    pool = start_pairs(servers, "1:3", "3:6", "2:6")
    settings = replace(QUICK, history_bytes=history_bytes)
    with watch(Client(toy, pool[0].address, settings=settings)) as client:

        def hit(step: int) -> None:
            if step == 7:
                kept = client.caches[0]()._history.blocks()
                assert kept == ([0] if not history_bytes else kept)
                assert len(kept) > 1 or not history_bytes
                serving(client, pool, 5).send(signal.SIGKILL)

        assert client.write(before=hit) == plain
        assert client.counters.reroutes == 1


def test_a_tree_that_is_pending_is_read_again_too(servers, toy, watch):
    """A pass with rows that run before it and are neither kept nor forgotten."""
    pool = start_pairs(servers, "0:6", "0:6")
    with watch(Client(toy, pool[0].address)) as client:
        target = client.target
        own = Decoder(make_toy(layers=BLOCKS))
        found = []
        for decoder in (own, target):
            cache, _ = decoder.prefill([PROMPT, PROMPT[:4]])
            tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
            mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool).expand(2, -1, -1)
            positions = torch.tensor([[0, 1, 1]]) + torch.tensor([[9], [4]])
            decoder.forward(tokens, positions, mask, cache)
            if decoder is target:
                serving(client, pool, 3).send(signal.SIGKILL)
            further = torch.cat([mask[:, 1:], torch.eye(2, dtype=torch.bool).expand(2, -1, -1)], 2)
            found.append(decoder.forward(tokens[:, :2], positions[:, 1:] + 1, further, cache))
            cache.keep([[0, 2], [0, 1, 3]])
            found[-1] = torch.cat(
                [found[-1], decoder.forward(tokens[:, :1], torch.tensor([[11], [7]]),
                 torch.ones(2, 1, 1, dtype=torch.bool), cache)], 1)  # fmt: skip
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-9)
        assert client.counters.reroutes == 1


@pytest.mark.parametrize("fault", ["corrupt", *map(slow, ("babble", "huge", "half", "slow", "fail"))])
def test_what_a_broken_server_sends_is_not_believed(servers, toy, plain, watch, fault):
    bad = servers.start("0:6", fault=fault)
    settings = replace(STALLS, step_seconds=3.0)
    with watch(Client(toy, bad.address, settings=settings)) as client:

        def bring(step: int) -> None:
            if step == 1:  # another, so that the first steps are certainly the broken one's
                servers.start("0:6", bad.address)

        assert client.write(before=bring) == plain
        assert client.counters.reroutes >= 1
        assert client.counters.failures


@pytest.mark.slow
def test_blocks_that_nobody_serves_are_named_in_time(servers, toy, watch):
    pool = start_pairs(servers, "1:3", "3:6")
    settings = replace(QUICK, recover_seconds=3.0, ban_seconds=60.0)
    with watch(Client(toy, pool[0].address, settings=settings)) as client:

        def hit(step: int) -> None:
            if step == 4:
                serving(client, pool, 4).send(signal.SIGKILL)

        began = time.monotonic()
        with pytest.raises(UserError, match=r"nobody serves blocks 3–5 of .*--blocks 3:6"):
            client.write(before=hit)
        assert time.monotonic() - began < 45


@pytest.mark.slow
def test_a_full_cache_sends_sessions_elsewhere(servers, toy, plain):
    from t2iprobe.llm.swarm.server import ServerSettings

    small = servers.start("0:6", settings=ServerSettings(cache_bytes=1000))
    settings = replace(QUICK, recover_seconds=2.0, attempts=3)
    with Client(toy, small.address, settings=settings) as client:
        with pytest.raises(UserError, match="full: the cache has 1000 of"):
            client.write()
        servers.start("0:6", small.address)
        assert client.write() == plain


# -- those who talk to a server and should not ---------------------------------------------------------


def ask(client: Client, server: Server, *frames: bytes, seconds: float = 5.0):
    swarm = client.target.swarm
    swarm.refresh()
    stream = swarm.connect(server.peer)
    try:
        return swarm.node.run(stream.ask(frames, seconds, seconds))
    finally:
        stream.close()


def open_frame(client: Client, **changes) -> bytes:
    fields = {"model": str(client.target.swarm.key), "first": 0, "last": 2, "batch": 1, "capacity": 8}
    return encode_frame(Frame(Kind.OPEN, fields | changes))


def step_frame(rows: int = 1, width: int = 32, *, mask=None, position: int = 0, **changes) -> bytes:
    fields = {"step": 0, "before": [], "wanted": rows} | changes
    sees = torch.ones(1, rows, rows, dtype=torch.bool) if mask is None else mask
    tensors = (torch.zeros(1, rows, width), torch.full((1, rows), position), sees)
    return encode_frame(Frame(Kind.STEP, fields, tensors))


def test_a_server_refuses_what_makes_no_sense_and_stays(client, three, plain):
    from t2iprobe.llm.swarm.transport import PeerError

    right = ask(client, three[0], open_frame(client), step_frame())
    assert right.tensors[0].shape == (1, 1, 32)
    wrong = [
        ([step_frame()], "no session"),
        ([open_frame(client, model="another"), step_frame()], "this is"),
        ([open_frame(client, first=1, last=5), step_frame()], "moved: these are blocks 0:2"),
        ([open_frame(client, batch=0), step_frame()], "batch is 0"),
        ([open_frame(client, capacity=2**31), step_frame()], "capacity"),
        ([open_frame(client, capacity=2**30), step_frame()], "full"),
        ([open_frame(client), step_frame(width=31)], "another shape"),
        ([open_frame(client), step_frame(position=-1)], "outside the model's context"),
        ([open_frame(client), step_frame(position=10**6)], "outside the model's context"),
        ([open_frame(client), step_frame(mask=torch.ones(1, 1, 9, dtype=torch.bool))], "mask"),
        ([open_frame(client), step_frame(step=1)], "step 1 where 0 is due"),
        ([open_frame(client), step_frame(before=[["keep", [[0]]]])], "rows to keep"),
        ([open_frame(client), step_frame(before=[["crop", [5]]])], "a cut"),
        ([open_frame(client), step_frame(before=[["select", [1]]])], "texts to go on with"),
        ([open_frame(client), step_frame(before=[["drop", [1]]])], "unknown operation"),
        ([open_frame(client), step_frame(before=7)], "another form"),
        ([encode_frame(Frame(Kind.RESULT))], "none to ask with"),
        ([encode_frame(Frame(Kind.FORWARD, {"model": "x"}))], "this is"),
    ]
    for frames, reason in wrong:
        with pytest.raises(PeerError, match=reason):
            ask(client, three[0], *frames)
    for junk in (b"GET / HTTP/1.1\r\n\r\n" * 4, b"T2IS" + bytes(40)):
        with pytest.raises(PeerError):
            ask(client, three[0], junk)
    assert client.write() == plain


def test_a_step_said_twice_leaves_no_trace(client, three):
    from t2iprobe.llm.swarm.transport import PeerError

    swarm = client.target.swarm
    stream = swarm.connect(three[0].peer)
    first = swarm.node.run(stream.ask([open_frame(client), step_frame()], 5, 5))
    assert first.fields["step"] == 0
    with pytest.raises(PeerError, match="step 0 where 1 is due"):
        swarm.node.run(stream.ask([step_frame()], 5, 5))


@pytest.mark.slow
def test_a_half_open_stream_keeps_no_session(servers, toy):
    from t2iprobe.llm.swarm.server import ServerSettings

    server = servers.start("0:2", settings=ServerSettings(session_seconds=4.0, frame_seconds=4.0))
    with Client(toy, server.address) as client:
        swarm = client.target.swarm
        swarm.refresh()
        streams = [swarm.connect(server.peer) for _ in range(4)]
        for stream, data in zip(
            streams, (b"", b"T2I", open_frame(client), open_frame(client) + step_frame()[:-5]), strict=True
        ):
            stream._writer.write(data)

        def sessions() -> int:
            return ask(client, server, encode_frame(Frame(Kind.PING))).fields["sessions"]

        wait_until(lambda: sessions() == 2)
        wait_until(lambda: sessions() == 0)  # though the client holds its streams open


def test_only_peers_on_the_list_are_spoken_to(servers, toy, plain):
    first = servers.start("0:6")
    closed = servers.start("0:6", first.address, allowed=["12D3KooWNobody"])
    with Client(toy, first.address) as client:
        from t2iprobe.llm.swarm.transport import PeerError

        wait_until(lambda: client.target.swarm.refresh() or len(client.target.swarm.servers) == 2)
        with pytest.raises(PeerError):
            ask(client, closed, encode_frame(Frame(Kind.PING)))
        assert client.write() == plain
    with Client(toy, first.address, allowed=[first.peer]) as client:
        assert client.write() == plain
        assert list(client.target.swarm.servers) == [first.peer]
    settings = Settings(recover_seconds=0.5)
    with (
        Client(toy, first.address, allowed=["12D3KooWNobody"], settings=settings) as client,
        pytest.raises(UserError, match="nobody serves blocks 0–5"),
    ):
        client.write()


def test_an_address_where_nobody_is_is_told_in_one_line(toy):
    nowhere = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWBXkAFBrtuYC777y4jMVT2rTiNk7p56dm1cWaXS7dSic2"
    for address in (nowhere, "nonsense"):
        with pytest.raises(UserError, match="cannot join the swarm at"):
            Client(toy, address)

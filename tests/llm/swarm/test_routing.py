"""Routes against every path there is."""

import itertools
import random

import pytest

from t2iprobe.llm.swarm.routing import (
    FULL_SECONDS,
    Hop,
    MissingBlocks,
    Offer,
    describe_blocks,
    find_holes,
    find_route,
    route_seconds,
)


def all_routes(offers: list[Offer], first: int, last: int):
    """Every way to cut first … last into hops, each by every peer that could take it."""
    for cuts in itertools.product([False, True], repeat=last - first - 1):
        borders = [first, *(first + 1 + place for place, cut in enumerate(cuts) if cut), last]
        spans = list(itertools.pairwise(borders))
        choices = [
            [offer.peer for offer in offers if offer.first <= begin and end <= offer.last]
            for begin, end in spans
        ]
        for peers in itertools.product(*choices):
            yield [Hop(peer, *span) for peer, span in zip(peers, spans, strict=True)]


@pytest.mark.parametrize("seed", range(60))
def test_the_cheapest_route_is_that_of_brute_force(seed):
    rng = random.Random(seed)
    blocks = rng.randint(1, 6)
    offers, rtt = [], {}
    for number in range(rng.randint(1, 5)):
        first = rng.randrange(blocks)
        last = rng.randint(first + 1, blocks)
        room, slot, waiting = rng.choice([100, 10_000]), rng.choice([0, 10]), rng.randrange(3)
        offers.append(Offer(f"peer{number}", first, last, rng.uniform(0, 0.2), room, slot, waiting))
        if rng.random() < 0.8:
            rtt[f"peer{number}"] = rng.uniform(0, 0.3)
    tokens = rng.choice([0, 5, 50])
    routes = list(all_routes(offers, 0, blocks))
    if not routes:
        with pytest.raises(MissingBlocks):
            find_route(offers, 0, blocks, rtt, tokens)
        return
    best = min(route_seconds(route, offers, rtt, tokens) for route in routes)
    found = find_route(offers, 0, blocks, rtt, tokens)
    assert found in routes
    assert route_seconds(found, offers, rtt, tokens) == pytest.approx(best, abs=1e-12)


def test_a_part_of_the_blocks_is_routed_by_itself():
    offers = [Offer("a", 0, 4), Offer("b", 2, 8), Offer("c", 6, 10)]
    rtt = dict.fromkeys("abc", 0.01)
    assert [hop.peer for hop in find_route(offers, 3, 9, rtt)] == ["b", "c"]
    assert [hop.peer for hop in find_route(offers, 0, 10, rtt)] == ["a", "b", "c"]


def test_a_full_server_is_the_last_resort():
    offers = [Offer("full", 0, 2, 0.0, 10, 100), Offer("slow", 0, 2, 1.0)]
    assert find_route(offers, 0, 2, tokens=5) == [Hop("slow", 0, 2)]
    offers[1] = Offer("slow", 0, 2, FULL_SECONDS)
    assert find_route(offers, 0, 2, tokens=5) == [Hop("full", 0, 2)]
    assert find_route(offers, 0, 2, tokens=0) == [Hop("full", 0, 2)]


def test_missing_blocks_are_named():
    offers = [Offer("a", 0, 2), Offer("b", 5, 6)]
    with pytest.raises(MissingBlocks, match="blocks 2–4, 6–7") as error:
        find_route(offers, 0, 8)
    assert error.value.blocks == (2, 3, 4, 6, 7)
    assert find_holes(offers, 0, 2) == []
    assert describe_blocks([3]) == "block 3"
    with pytest.raises(MissingBlocks):
        find_route([], 0, 1)


def test_routing_hundreds_of_servers_takes_moments():
    rng = random.Random(0)
    offers = []
    for number in range(300):
        first = rng.randrange(70)
        offers.append(Offer(f"p{number}", first, min(80, first + 20), rng.uniform(0.01, 0.1)))
    offers.append(Offer("end", 60, 80, 0.01))
    offers.append(Offer("begin", 0, 20, 0.01))
    rtt = {offer.peer: rng.uniform(0.01, 0.2) for offer in offers}
    route = find_route(offers, 0, 80, rtt)
    assert route[0].first == 0
    assert route[-1].last == 80
    assert all(one.last == two.first for one, two in itertools.pairwise(route))

import pytest
import torch

from t2iprobe.llm.engine.cache import RowCache

HEADS, SIZE, LAYERS = 2, 3, 2


class ListedCache:
    """What a RowCache should hold, as lists: of each text the committed rows, then the pending ones."""

    def __init__(self, batch: int) -> None:
        self.committed: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self.pending: list[list[torch.Tensor]] = [[] for _ in range(batch)]

    def add(self, states: torch.Tensor) -> None:
        for row, new in enumerate(states):
            self.pending[row] += list(new.unbind(1))

    def keep(self, rows: list[list[int]]) -> None:
        for row, chosen in enumerate(rows):
            self.committed[row] += [self.pending[row][number] for number in chosen]
            self.pending[row] = []


def run_pass(cache: RowCache, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a model does with a cache in a pass of random numbers; returns what it saw in each layer."""
    cache.reserve(positions)
    new = [torch.randn(2, len(positions), HEADS, positions.shape[1], SIZE) for _ in range(LAYERS)]
    seen = [cache.update(keys, values, layer) for layer, (keys, values) in enumerate(new)]
    cache.advance(positions.shape[1])
    return [(torch.stack(views), states) for views, states in zip(seen, new, strict=True)]


@pytest.mark.parametrize("batch", [1, 3])
def test_kept_rows_are_those_that_lists_would_keep(batch):
    generator = torch.Generator().manual_seed(0)
    cache = RowCache(batch, 4)  # grows several times
    listed = [[ListedCache(batch) for _ in "kv"] for _ in range(LAYERS)]
    for step in range(12):
        for _ in range(1 + step % 2):
            rows = int(torch.randint(1, 5, (), generator=generator))
            for (seen, states), pair in zip(
                run_pass(cache, torch.zeros(batch, rows).long()), listed, strict=True
            ):
                for kind, expected in enumerate(pair):
                    expected.add(states[kind])
                    for row in range(batch):
                        whole = torch.stack(expected.committed[row] + expected.pending[row], 1)
                        assert torch.equal(seen[kind, row][:, : whole.shape[1]], whole)
        kept = []
        for _ in range(batch):
            order = torch.randperm(cache.pending, generator=generator)
            kept.append(order[: int(torch.randint(0, len(order) + 1, (), generator=generator))].tolist())
        cache.keep(kept)
        for pair in listed:
            for expected in pair:
                expected.keep(kept)
        assert cache.lengths == [len(text) for text in listed[0][0].committed]
        assert cache.pending == 0
    assert cache.capacity >= max(cache.lengths)


def test_positions_move_with_their_rows():
    cache = RowCache(2, 8)
    run_pass(cache, torch.tensor([[0, 1, 2], [0, 1, 2]]))
    cache.keep([[0, 1, 2], [0]])
    run_pass(cache, torch.tensor([[3, 4, 4, 5], [1, 2, 2, 3]]))
    cache.keep([[0, 2, 3], [0, 1]])
    assert cache.positions[0, :6].tolist() == [0, 1, 2, 3, 4, 5]
    assert cache.positions[1, :3].tolist() == [0, 1, 2]


def test_rows_that_stand_already_right_are_not_copied(monkeypatch):
    cache = RowCache(1, 8)
    run_pass(cache, torch.arange(6)[None])
    monkeypatch.setattr(torch.Tensor, "index_select", None)
    cache.keep([[0, 1, 2, 3]])
    assert cache.lengths == [4]


@pytest.mark.parametrize("window", [None, 1, 3, 5])
def test_mask_shows_the_text_the_ancestors_and_no_further_than_the_window(window):
    cache = RowCache(2, 32)
    run_pass(cache, torch.arange(6).repeat(2, 1))
    cache.keep([range(6), range(2)])
    run_pass(cache, torch.tensor([[6, 7], [2, 3]]))
    tree_mask = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    positions = torch.tensor([[7, 8, 9], [3, 4, 5]])
    cache.reserve(positions)
    mask = cache.mask(tree_mask, torch.float32, window)
    assert mask.shape == (2, 1, 3, 6 + 2 + 3)
    everywhere = [[*range(6), 6, 7, *positions[0]], [*range(2), 2, 3, *positions[1]]]
    for row, length in enumerate([6, 2]):
        for query in range(3):
            for slot in range(mask.shape[-1]):
                seen = slot < length or (slot < length + 5 and bool(tree_mask[row, query, slot - length]))
                if seen and window is not None:
                    seen = int(positions[row, query]) - everywhere[row][slot] < window
                assert (mask[row, 0, query, slot] == 0) == seen
    assert mask.min() < -1e37
    assert mask.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_that_sees_nothing_stays_finite_in_every_softmax(dtype):
    cache = RowCache(1, 4)
    cache.reserve(torch.zeros(1, 2, dtype=torch.int64))
    mask = cache.mask(torch.zeros(1, 2, 2, dtype=torch.bool), dtype)
    for logits in (mask + 20, mask - 20):
        assert logits.float().softmax(-1).isfinite().all()
        assert logits.softmax(-1).isfinite().all()


def test_a_pass_that_is_broken_off_leaves_no_trace():
    cache = RowCache(1, 4)
    run_pass(cache, torch.arange(3)[None])
    cache.keep([[0, 1, 2]])
    before = [tensor[:, :, :3].clone() for tensors in cache._layers.values() for tensor in tensors]
    cache.reserve(torch.full((1, 9), 7))
    cache.update(torch.full((1, HEADS, 9, SIZE), 5.0), torch.full((1, HEADS, 9, SIZE), 5.0), 0)
    assert (cache.lengths, cache.pending) == ([3], 0)
    after = [tensor[:, :, :3] for tensors in cache._layers.values() for tensor in tensors]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    ((seen, states), *_) = run_pass(cache, torch.tensor([[3]]))
    assert seen.shape[-2] == 4
    assert torch.equal(seen[..., 3:, :], states)


def test_a_cut_forgets_the_end_and_what_is_pending():
    cache = RowCache(2, 8)
    run_pass(cache, torch.arange(5).repeat(2, 1))
    cache.keep([range(5), range(3)])
    run_pass(cache, torch.tensor([[5], [3]]))
    cache.crop([2, 3])
    assert (cache.lengths, cache.pending) == ([2, 3], 0)
    with pytest.raises(ValueError, match="cannot be cut"):
        cache.crop([3, 3])


def test_the_texts_that_go_on_keep_their_rows_and_positions():
    cache, other = RowCache(3, 4), RowCache(2, 4)
    for each, rows in ((cache, [0, 1, 2]), (other, [2, 0])):
        torch.manual_seed(0)
        new = [torch.randn(2, 3, HEADS, 6, SIZE)[:, rows] for _ in range(LAYERS)]
        each.reserve(torch.arange(6).expand(len(rows), -1))
        for layer, (keys, values) in enumerate(new):
            each.update(keys, values, layer)
        each.advance(6)
        each.keep([[[0, 1], [2, 3, 5], [0, 4, 1, 2]][row] for row in rows])
    cache.select([2, 0])
    assert cache.lengths == other.lengths == [4, 2]
    assert cache.nbytes == other.nbytes
    assert all(map(torch.equal, cache._tensors(), other._tensors()))
    ((seen, states), *_) = run_pass(cache, torch.tensor([[4], [2]]))
    assert torch.equal(seen[:, 0, :, 4:], states[:, 0])
    assert torch.equal(seen[:, 1, :, 2:3], states[:, 1])


def test_bytes_are_those_of_all_slots():
    cache = RowCache(2, 8)
    assert cache.nbytes == 0
    run_pass(cache, torch.arange(5).repeat(2, 1))
    assert cache.nbytes == 2 * LAYERS * 2 * HEADS * 8 * SIZE * 4

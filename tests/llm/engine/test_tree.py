import pytest
import torch

from t2iprobe.llm.engine.tree import make_tree


def test_a_tree_knows_its_depths_ranks_children_and_paths() -> None:
    tree = make_tree([9, 4, 5, 6, 4, 7], [-1, 0, 0, 1, 2, 3], [0.0, -1.0, -2.0, -3.0, -4.0, -5.0])
    assert tree.depths.tolist() == [0, 1, 1, 2, 2, 3]
    assert tree.ranks.tolist() == [0, 0, 1, 0, 0, 0]
    assert tree.origin.tolist() == [0, 1, 2, 3, 4, 5]
    assert (len(tree), tree.budget) == (6, 5)
    assert tree.children(0).tolist() == [1, 2]
    assert tree.children(5).tolist() == []
    assert tree.path(5).tolist() == [4, 6, 7]
    assert tree.path(0).tolist() == []
    assert tree.log_probs.dtype == torch.float64


def test_a_lone_root_is_a_tree() -> None:
    tree = make_tree([3], [-1])
    assert tree.budget == 0
    assert tree.ancestors().tolist() == [[True]]


@pytest.mark.parametrize("seed", range(5))
def test_ancestors_are_what_walking_up_finds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parents = [-1, *(int(torch.randint(node, (), generator=generator)) for node in range(1, 40))]
    tree = make_tree(list(range(40)), parents)
    expected = torch.zeros(40, 40, dtype=torch.bool)
    for node in range(40):
        above = node
        while above >= 0:
            expected[node, above] = True
            above = parents[above]
    assert torch.equal(tree.ancestors(), expected)
    assert torch.equal(tree.ancestors().sum(1) - 1, tree.depths)


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([], [], "root"),
        ([1, 2], [0, 0], "root"),
        ([1, 2, 3], [-1, 2, 0], "before"),
        ([1, 2], [-1, -1], "before"),
        ([1, 2, 2], [-1, 0, 0], "two children of node 0"),
    ],
)
def test_what_is_no_tree_is_refused(tokens: list[int], parents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tree(tokens, parents)

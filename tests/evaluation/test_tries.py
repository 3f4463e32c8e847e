"""Rows of sequences that begin alike: what they hold, what sees what, and which models read them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bitassay
from bitassay.evaluation.tries import Trie, attends_by_mask, rows_of
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.testing.tiny import tiny_model

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6)


@given(SEQUENCES)
def test_a_path_spells_its_sequence_and_sees_nothing_else(sequences):
    trie = Trie.of(sequences)
    assert len(trie.tokens) == len({tuple(one[: stop + 1]) for one in sequences for stop in range(len(one))})
    for sequence, path in zip(sequences, trie.paths, strict=True):
        assert [trie.tokens[node] for node in path] == sequence
        assert [trie.depths[node] for node in path] == list(range(len(sequence)))
        assert path == sorted(path)
        for place, node in enumerate(path):
            assert trie.sees()[node].nonzero()[:, 0].tolist() == path[: place + 1]


def test_what_is_shared_has_one_node():
    trie = Trie.of([[7, 8, 9], [7, 8, 5, 9], [7, 8]])
    assert trie.tokens == [7, 8, 9, 5, 9]
    assert trie.depths == [0, 1, 2, 2, 3]
    assert trie.paths == [[0, 1, 2], [0, 1, 3, 4], [0, 1]]


def test_rows_behind_a_past_that_all_see():
    tokens, positions, mask = rows_of([Trie.of([[7, 8], [7, 9]]), Trie.of([[5]])], 2, torch.float64)
    assert tokens.tolist() == [[7, 8, 9], [5, 0, 0]]
    assert positions[0].tolist() == [2, 3, 3]
    assert mask.dtype == torch.float64
    sees = (mask == 0).int()[:, 0].tolist()
    assert sees[0] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
    assert sees[1][0] == [1, 1, 1, 0, 0]
    assert torch.isfinite(mask).all()  # rows of padding too: nothing that is NaN


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("llama", True), ("qwen2", True), ("mixtral", True), ("gemma3", False), ("gpt_oss", False)],
)
def test_models_with_sliding_windows_are_read_otherwise(architecture, expected):
    assert attends_by_mask(tiny_model(architecture)) is expected


def test_so_are_models_whose_keys_are_rounded(stories):
    recipe = Recipe(name="kv", weights=None, kv_cache={"format": "int8"})
    assert attends_by_mask(stories)
    assert not attends_by_mask(bitassay.quantize(stories, recipe))

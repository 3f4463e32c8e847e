import hashlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitassay.verification.receipts.merkle import (
    cell_leaf,
    cell_leaves,
    merkle_node,
    merkle_proof,
    merkle_root,
    proof_length,
    root_from_proof,
)

LEAVES = [hashlib.sha256(bytes([index])).digest() for index in range(70)]


@st.composite
def opened_trees(draw):
    n = draw(st.integers(1, 70))
    opened = draw(st.sets(st.integers(0, n - 1), min_size=1))
    return n, sorted(opened)


def test_the_shape_is_that_of_rfc_6962():
    """Seven leaves, the example of the RFC's section 2.1.3."""
    a, b, c, d, e, f, g = LEAVES[:7]
    left = merkle_node(merkle_node(a, b), merkle_node(c, d))
    right = merkle_node(merkle_node(e, f), g)
    assert merkle_root(LEAVES[:7]) == merkle_node(left, right)
    assert merkle_proof(LEAVES[:7], [0]) == [b, merkle_node(c, d), right]
    assert merkle_proof(LEAVES[:7], [6]) == [left, merkle_node(e, f)]
    assert merkle_root(LEAVES[:1]) == a


def test_the_hashes_are_those_of_the_essay():
    assert merkle_node(b"l", b"r") == hashlib.sha256(b"\x01lr").digest()
    where = (8).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"bfloat16\0"
    assert cell_leaf(8, 3, "bfloat16", b"x") == hashlib.sha256(b"\0bitassay cell 1\0" + where + b"x").digest()


@settings(deadline=None)
@given(opened_trees())
def test_what_is_opened_gives_the_root(tree):
    n, opened = tree
    proof = merkle_proof(LEAVES[:n], opened)
    cells = {index: LEAVES[index] for index in opened}
    assert root_from_proof(n, cells, proof) == merkle_root(LEAVES[:n])
    assert len(proof) == proof_length(n, opened)
    assert len(proof) <= len(opened) * max(1, (n - 1).bit_length())


@settings(deadline=None, max_examples=60)
@given(opened_trees(), st.data())
def test_any_change_gives_another_root_or_none(tree, data):
    n, opened = tree
    root, proof = merkle_root(LEAVES[:n]), merkle_proof(LEAVES[:n], opened)
    cells = {index: LEAVES[index] for index in opened}
    forged = data.draw(st.sampled_from(opened))
    assert root_from_proof(n, cells | {forged: hashlib.sha256(b"forged").digest()}, proof) != root
    assert root_from_proof(n, cells, [*proof, LEAVES[0]]) is None
    if proof:
        at = data.draw(st.integers(0, len(proof) - 1))
        assert root_from_proof(n, cells, proof[:-1]) is None
        flipped = bytes([proof[at][0] ^ 1]) + proof[at][1:]
        assert root_from_proof(n, cells, [*proof[:at], flipped, *proof[at + 1 :]]) != root
        swapped = proof[::-1]
        assert swapped == proof or root_from_proof(n, cells, swapped) != root


def test_an_inner_node_cannot_be_shown_as_a_cell():
    """Without the two first bytes the pair (a, b) could be a leaf of a tree with half as many."""
    a, b = LEAVES[:2]
    assert merkle_root([a, b]) != cell_leaf(int.from_bytes(a[:4], "little"), 0, "", a + b)
    assert root_from_proof(1, {0: a + b}, []) != merkle_root([a, b])
    assert hashlib.sha256(a + b).digest() != merkle_node(a, b)


def test_every_part_of_a_cell_is_bound():
    states = {8: torch.arange(6, dtype=torch.bfloat16).view(2, 3), 16: torch.ones(2, 3, dtype=torch.bfloat16)}
    leaves = cell_leaves(states, (0, 1), "bfloat16")
    assert len(set(leaves)) == 4
    assert leaves[1] == cell_leaf(16, 0, "bfloat16", b"\x80\x3f" * 3)
    assert cell_leaves(states, (0, 2), "bfloat16")[2] != leaves[2]
    assert cell_leaves(states, (0, 1), "float16")[0] != leaves[0]
    assert cell_leaves(states | {8: states[8] + 1}, (0, 1), "bfloat16")[0] != leaves[0]
    assert cell_leaves({8: states[8]}, (0, 1), "bfloat16") == leaves[::2]

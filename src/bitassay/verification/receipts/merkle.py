"""A Merkle tree over the cells of a trace: one hash commits to all of them, and any few can be shown later.

A cell is the hidden state of one layer at one position. With H = SHA-256 and | for joining bytes,

    leaf(layer, position, dtype, state) = H(0x00 | "bitassay cell 1" | layer | position | dtype | state)
    node(left, right)                   = H(0x01 | left | right)

and the tree over n > 1 leaves is node(tree over the first k, tree over the rest), k the largest power of two
below n. The bytes 0x00 and 0x01 keep leaves and nodes apart, so that no inner node can be shown as a cell
(a second preimage). Source: RFC 6962, section 2.1, whose shape this is; the leaf's content is ours.

The cells of a trace come position by position, and within a position layer by layer, as the header lists
them. One proof shows any set of leaves: the roots of the largest subtrees that hold none of them, from left
to right. Which these are follows from n and the set alone, so a proof has no structure that could be forged;
for one leaf it is the usual audit path.

Left out: consistency proofs. A trace does not grow.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from jaxtyping import Shaped
from torch import Tensor, uint8

DIGEST_BYTES = 32
LEAF, NODE = b"\0bitassay cell 1\0", b"\1"


def cell_leaf(layer: int, position: int, dtype: str, state: bytes) -> bytes:
    """Return the leaf of one cell. state: its numbers in `dtype`, little-endian."""
    where = layer.to_bytes(4, "little") + position.to_bytes(4, "little") + dtype.encode() + b"\0"
    return hashlib.sha256(LEAF + where + state).digest()


def cell_leaves(
    states: Mapping[int, Shaped[Tensor, "positions hidden"]], positions: Sequence[int], dtype: str
) -> list[bytes]:
    """Return the leaves of all cells, position by position; row i of every layer is at `positions[i]`."""
    rows = {layer: tensor.contiguous().view(uint8).numpy() for layer, tensor in states.items()}
    return [
        cell_leaf(layer, position, dtype, rows[layer][index].tobytes())
        for index, position in enumerate(positions)
        for layer in states
    ]


def merkle_node(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node."""
    return hashlib.sha256(NODE + left + right).digest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Return the root of the tree over one leaf or more."""
    assert leaves
    if len(leaves) == 1:
        return leaves[0]
    k = first_half(len(leaves))
    return merkle_node(merkle_root(leaves[:k]), merkle_root(leaves[k:]))


def merkle_proof(leaves: Sequence[bytes], opened: Sequence[int]) -> list[bytes]:
    """Return the hashes that, with the leaves `opened` (ascending indices, each once), give the root."""
    return [merkle_root(leaves[start:stop]) for start, stop in unopened(len(leaves), opened)]


def proof_length(n: int, opened: Sequence[int]) -> int:
    """Return the number of hashes in the `merkle_proof` of these leaves of n."""
    return sum(1 for _ in unopened(n, opened))


def root_from_proof(n: int, opened: Mapping[int, bytes], proof: Sequence[bytes]) -> bytes | None:
    """Return the root of the tree of n leaves in which these are `opened`; None where the proof has another
    length."""
    indices, rest = sorted(opened), iter(proof)
    if len(proof) != proof_length(n, indices):
        return None

    def root(start: int, stop: int) -> bytes:
        if not any_within(indices, start, stop):
            return next(rest)
        if stop - start == 1:
            return opened[start]
        middle = start + first_half(stop - start)
        return merkle_node(root(start, middle), root(middle, stop))

    return root(0, n)


def unopened(n: int, opened: Sequence[int], start: int = 0) -> Iterator[tuple[int, int]]:
    """Yield the largest subtrees over `start` .. `start` + n - 1 without an opened leaf, as ranges of leaves
    from left to right."""
    if not any_within(opened, start, start + n):
        yield start, start + n
    elif n > 1:
        k = first_half(n)
        yield from unopened(k, opened, start)
        yield from unopened(n - k, opened, start + k)


def first_half(n: int) -> int:
    """Return the largest power of two below n."""
    return 1 << ((n - 1).bit_length() - 1)


def any_within(ascending: Sequence[int], start: int, stop: int) -> bool:
    """Return whether any of the numbers is in start .. stop - 1."""
    at = bisect_left(ascending, start)
    return at < len(ascending) and ascending[at] < stop

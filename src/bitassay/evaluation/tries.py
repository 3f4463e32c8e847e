"""Tree attention: sequences with a common prefix in one row.
No token that they share is read twice (SpecInfer, 2305.09781, section 4.1).

The sequences make a trie, whose nodes stand in a row, parents before children. The mask lets a node see its
ancestors and itself alone, and its position is its depth; so its hidden state is that of a row of its
sequence alone. The model must attend exactly where a mask says: `attends_by_mask`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.decode import TokenIds
from bitassay.models.cache import keeps_positions
from bitassay.models.walk import decoder_layers


@dataclass(frozen=True)
class Trie:
    """A row: its tokens, the parent of each (-1: none) and its depth; and the path of each sequence's nodes
    from the root."""

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    paths: list[list[int]]

    @classmethod
    def of(cls, sequences: Sequence[TokenIds]) -> "Trie":
        """Return the trie of some sequences."""
        node_of: dict[tuple[int, int], int] = {}  # by parent and token; -1 is the parent of the first
        depths, paths = [], []
        for sequence in sequences:
            path = []
            for depth, token in enumerate(sequence):
                key = (path[-1] if path else -1, token)
                if key not in node_of:
                    node_of[key] = len(node_of)
                    depths.append(depth)
                path.append(node_of[key])
            paths.append(path)
        return cls([token for _, token in node_of], [parent for parent, _ in node_of], depths, paths)

    def sees(self) -> Bool[Tensor, "nodes nodes"]:
        """Return what each node attends to: its ancestors and itself."""
        visible = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                visible[node] |= visible[parent]
        return visible


def attends_by_mask(model: PreTrainedModel) -> bool:
    """Return whether every layer attends to what a mask says, however far back, and keeps keys as they are;
    False for code that is not transformers' own."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return (
        type(model).__module__.startswith("transformers.models.")
        and keeps_positions(model)
        and not kinds
        and not any(windows)
        and getattr(model, "kv_cache", None) is None
        and config._attn_implementation in ("eager", "sdpa")
        and all(hasattr(layer, "self_attn") for layer in decoder_layers(model))
    )


def rows_of(
    tries: Sequence[Trie], past: int, dtype: torch.dtype
) -> tuple[Int[Tensor, "rows tokens"], Int[Tensor, "rows tokens"], Float[Tensor, "rows 1 tokens all"]]:
    """Return tokens, positions and the mask to add, behind `past` tokens that every node sees. Padding sees
    what is before it."""
    longest = max(len(trie.tokens) for trie in tries)
    tokens = torch.zeros(len(tries), longest, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    sees = torch.ones(longest, longest, dtype=torch.bool).tril().repeat(len(tries), 1, 1)
    for row, trie in enumerate(tries):
        size = len(trie.tokens)
        tokens[row, :size] = torch.tensor(trie.tokens)
        positions[row, :size] = torch.tensor(trie.depths)
        sees[row, :size, :size] = trie.sees()
    sees = torch.cat([sees.new_ones(len(tries), longest, past), sees], 2)
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    return tokens, positions + past, mask[:, None]

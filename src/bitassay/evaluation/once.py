"""Prompts that are asked twice, for the likelihood of a letter and for a text, and are read once.

MMLU `direct` wants log p(letter | prompt), MMLU `generate` what greedy decoding writes behind that prompt.
Both begin with the distribution after the prompt's last token, and nearly all of the work is to get there.
So `loglikelihood` keeps the keys and values of the prompts that it read, and `generate_until` goes on from
them:

    read       what all prompts begin with, one row; then the rest of each, padded on the right, where causal
               attention never looks; the logits of each row's last token
    continue   all rows at once: the padding between a prompt and what it is continued with is masked, and a
               row's positions go on from its own length

Prompts that were not read, continuations of more than one token, and caches that are not plain keys and
values by position (sliding windows, rounded ones) are left to `BitassayLM`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from lm_eval.api.instance import Instance
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from bitassay.engines.decode import TokenIds, default_batch_tokens, end_tokens, token_batches
from bitassay.evaluation.greedy import cut, is_stopped
from bitassay.evaluation.harness import BitassayLM
from bitassay.evaluation.likelihood import Prefix, common_prefixes, logits_at, right_pad
from bitassay.models.cache import behind, keeps_positions
from bitassay.models.positions import frequencies
from bitassay.quantization.inputs.kv_cache import empty_cache


@dataclass
class Rows:
    """Prompts that a model has read: a cache that is padded on the right to one length, and the logits after
    each prompt's last token. Continuing uses it up."""

    model: PreTrainedModel
    prompts: list[tuple[int, ...]]
    cache: DynamicCache
    logits: Float[Tensor, "rows vocabulary"]


def read_rows(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], batch_tokens: int | None = None
) -> list[Rows]:
    """Read different prompts, none empty: first what they share, then their rests in batches."""
    budget, found = default_batch_tokens(model) if batch_tokens is None else batch_tokens, []
    ordered = sorted(prompts)
    for start, stop, shared in common_prefixes([prompt[:-1] for prompt in ordered]):
        trunk = Prefix.read(model, ordered[start][:shared])
        rests = [prompt[shared:] for prompt in ordered[start:stop]]
        for batch in token_batches([len(rest) for rest in rests], budget, shared):
            rows = trunk.spread([0] * len(batch))
            tokens = right_pad([rests[place] for place in batch], model.device)
            last = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
            for row, place in enumerate(batch):
                last[row, len(rests[place]) - 1] = True
            logits = logits_at(model, tokens, last, behind(model, rows.cache, rows.length, tokens))
            found.append(Rows(model, [ordered[start + place] for place in batch], rows.cache, logits))
    return found


@torch.inference_mode()
def continue_rows(rows: Rows, tokenizer: Any, stops: Sequence[str], max_new_tokens: int) -> list[str]:
    """What greedy decoding writes behind each prompt, up to a stop string, the end of text or
    `max_new_tokens`; as `greedy_texts`, to which it is equal but for rounding."""
    model, ends = rows.model, end_tokens(rows.model)
    lengths = torch.tensor([len(prompt) for prompt in rows.prompts])
    width = rows.cache.get_seq_length()
    mask = (torch.arange(width) < lengths[:, None]).long()
    outputs: list[list[int]] = [[] for _ in rows.prompts]
    going, logits = list(range(len(rows.prompts))), rows.logits
    for step in range(max_new_tokens):
        for row, token in zip(going, logits.float().argmax(-1).tolist(), strict=True):
            outputs[row].append(token)
        kept = [
            place
            for place, row in enumerate(going)
            if outputs[row][-1] not in ends and not is_stopped(tokenizer.decode(outputs[row]), stops)
        ]
        if not kept or step + 1 == max_new_tokens:
            break
        if len(kept) < len(going):
            rows.cache.batch_select_indices(torch.tensor(kept, device=model.device))
            mask = mask[kept]
        going = [going[place] for place in kept]
        mask = torch.cat([mask, mask.new_ones(len(going), 1)], 1)
        forward = model(
            input_ids=torch.tensor([outputs[row][-1:] for row in going], device=model.device),
            attention_mask=mask.to(model.device),
            position_ids=(lengths[going, None] + step).to(model.device),
            past_key_values=rows.cache,
            use_cache=True,
        )
        logits = forward.logits[:, -1]
    return [cut(tokenizer.decode(output, skip_special_tokens=True), stops) for output in outputs]


class OnceReadLM(BitassayLM):
    """A model for lm-eval that remembers the prompts of its last `loglikelihood`, for one
    `generate_until`."""

    _read: tuple[Rows, ...] = ()

    @cached_property
    def _plain_cache(self) -> bool:
        return has_plain_cache(self.model)

    def _alike(self, tokens: int) -> bool:
        """Whether the model reads all texts of up to so many tokens alike."""
        return frequencies(self.model, 1) == frequencies(self.model, tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        self._read = ()
        plain = all(len(end) == 1 and 0 < len(start) < self.max_length for _, start, end in requests)
        if (
            not plain
            or not self._plain_cache
            or not self._alike(max((len(start) for _, start, _ in requests), default=1))
        ):
            return super()._loglikelihood_tokens(requests, disable_tqdm, **options)
        prompts = dict.fromkeys(tuple(context) for _, context, _ in requests)
        self._read = tuple(read_rows(self.model, list(prompts), self.batch_tokens))
        after = {
            prompt: logits.float().log_softmax(-1)
            for rows in self._read
            for prompt, logits in zip(rows.prompts, rows.logits, strict=True)
        }
        return [
            (after[tuple(start)][end[0]].item(), bool(after[tuple(start)].argmax() == end[0]))
            for _, start, end in requests
        ]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        read, self._read = self._read, ()
        prompts = [tuple(self._encode_prompt(str(request.args[0]))) for request in requests]
        asked = [self._until(request.args[1]) for request in requests]  # type: ignore[arg-type]
        known = {prompt for rows in read for prompt in rows.prompts}
        penalty = self.model.generation_config.repetition_penalty  # type: ignore[union-attr]
        if (
            not known.issuperset(prompts)
            or any(one != asked[0] for one in asked)
            or penalty not in (None, 1.0)
        ):
            return super().generate_until(requests, disable_tqdm)
        stops, new_tokens = asked[0]
        longest = max(map(len, prompts)) + new_tokens
        if longest > self.max_length or not self._alike(longest):
            return super().generate_until(requests, disable_tqdm)
        texts: dict[TokenIds, str] = {}
        for rows in read:
            texts |= zip(rows.prompts, continue_rows(rows, self.tokenizer, stops, new_tokens), strict=True)
        return [texts[prompt] for prompt in prompts]


def has_plain_cache(model: PreTrainedModel) -> bool:
    """Whether a model's cache is keys and values, a place for each position."""
    return keeps_positions(model) and all(type(layer) is DynamicLayer for layer in empty_cache(model).layers)

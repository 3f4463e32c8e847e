"""Greedy texts with stop strings, for many prompts.

Prompts that begin alike share one reading of that beginning, and the rest is read and continued in batches of
equal length: no padding, no mask, so what a row gets does not depend on its company beyond rounding. A row
leaves its batch as soon as it has ended. The text is the decoded continuation up to the first stop string,
which is what lm-eval's `hf` model returns (lm-evaluation-harness 0.4.13, `models/huggingface.py`).
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, RepetitionPenaltyLogitsProcessor

from bitassay.engines.decode import TokenIds, default_batch_tokens, end_tokens, token_batches
from bitassay.evaluation.likelihood import Prefix, common_prefixes, may_share
from bitassay.models.cache import behind, last_logits, reads_on, select_rows, takes_cache
from bitassay.models.positions import frequencies
from bitassay.quantization.inputs.kv_cache import empty_cache


def greedy_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenIds],
    *,
    stops: Sequence[str],
    max_new_tokens: int,
    batch_tokens: int | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Continue each prompt (token ids, none empty) until a stop string, the end of text, or `max_new_tokens`.
    `done` hears how many are finished. In the order given, without the stop string."""
    budget = default_batch_tokens(model) if batch_tokens is None else batch_tokens
    order = sorted(range(len(prompts)), key=lambda index: tuple(prompts[index]))
    found: dict[int, str] = {}
    for start, stop, shared in common_prefixes([tuple(prompts[index])[:-1] for index in order]):
        run = order[start:stop]
        nothing, trunk = (
            Prefix.read(model, ()),
            Prefix.read(model, prompts[run[0]][: shared if reads_on(model) else 0]),
        )
        by_length: dict[int, list[int]] = {}
        for index in run:
            by_length.setdefault(len(prompts[index]), []).append(index)
        for length, equal in sorted(by_length.items()):
            begun = trunk if may_share(model, shared, length) else nothing
            rests = [length - begun.length] * len(equal)
            for batch in token_batches(rests, budget, begun.length + max_new_tokens):
                group = [equal[place] for place in batch]
                outputs = _continue(
                    begun.spread([0] * len(group)),
                    tokenizer,
                    [prompts[index] for index in group],
                    stops,
                    max_new_tokens,
                )
                found |= {
                    index: cut(tokenizer.decode(output, skip_special_tokens=True), stops)
                    for index, output in zip(group, outputs, strict=True)
                }
                done(len(found))
    return [found[index] for index in range(len(prompts))]


@torch.inference_mode()
def _continue(
    prefix: Prefix,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenIds],
    stops: Sequence[str],
    max_new_tokens: int,
) -> list[list[int]]:
    """Output token ids of prompts of equal length, which begin with what `prefix` has read."""
    model, cache, begun = prefix.model, prefix.cache, prefix.length
    ends, penalty = end_tokens(model), model.generation_config.repetition_penalty  # type: ignore[union-attr]
    process = RepetitionPenaltyLogitsProcessor(penalty) if penalty not in (None, 1.0) else None
    outputs: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    length, caches = len(prompts[0]), takes_cache(model)
    read_at = frequencies(model, length)
    head = last_logits(model, 1)
    for step in range(length, length + max_new_tokens):
        if not caches or frequencies(model, step) != read_at:  # what is cached is not what it would be now
            begun, cache, read_at = 0, empty_cache(model), frequencies(model, step)
        unread = [[*prompts[row], *outputs[row]][begun:] for row in going]
        tokens = torch.tensor(unread, device=model.device)
        held = behind(model, cache, begun, tokens) if caches else {"use_cache": False}
        forward = model(input_ids=tokens, **held, **head)
        logits, begun = forward.logits[:, -1].float(), step
        if process is not None:
            seen = [[*prompts[row], *outputs[row]] for row in going]
            logits = process(torch.tensor(seen, device=model.device), logits)  # type: ignore[arg-type]
        chosen = logits.argmax(-1).tolist()
        for row, token in zip(going, chosen, strict=True):
            outputs[row].append(token)
        kept = [
            place
            for place, row in enumerate(going)
            if outputs[row][-1] not in ends and not is_stopped(tokenizer.decode(outputs[row]), stops)
        ]
        if not kept:
            break
        if len(kept) < len(going):
            select_rows(cache, kept, model.device)
        going = [going[place] for place in kept]
    return outputs


def is_stopped(text: str | list[str], stops: Sequence[str]) -> bool:
    """Whether a stop string is in a text."""
    return any(stop in text for stop in stops if stop)


def cut(text: str | list[str], stops: Sequence[str]) -> str:
    """`text` before the first of the stop strings that is in it."""
    assert isinstance(text, str)
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text

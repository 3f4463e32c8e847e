"""Greedy texts with stop strings, for many prompts.

A common prefix of prompts is read once. The rest is read and continued in batches of equal length, without
padding or mask, so that a row does not depend on its batch beyond rounding. A row leaves its batch as soon as
it has ended. The text is the decoded continuation up to the first stop string, as lm-eval's `hf` model
returns it (lm-evaluation-harness 0.4.13, `models/huggingface.py`).
"""

from collections.abc import Callable, Container, Sequence

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
    """Continue each prompt (token ids, none empty) until a stop string, the end of text, or `max_new_tokens`;
    return the texts in that order, without the stop string. `done` is told how many are finished."""
    budget = default_batch_tokens(model) if batch_tokens is None else batch_tokens
    order = sorted(range(len(prompts)), key=lambda index: tuple(prompts[index]))
    texts: dict[int, str] = {}
    for start, stop, shared in common_prefixes([tuple(prompts[index])[:-1] for index in order]):
        run = order[start:stop]
        nothing = Prefix.read(model, ())
        prefix = Prefix.read(model, prompts[run[0]][: shared if reads_on(model) else 0])
        by_length: dict[int, list[int]] = {}
        for index in run:
            by_length.setdefault(len(prompts[index]), []).append(index)
        for length, equal in sorted(by_length.items()):
            begun = prefix if may_share(model, shared, length) else nothing
            rests = [length - begun.length] * len(equal)
            for batch in token_batches(rests, budget, begun.length + max_new_tokens):
                group = [equal[item] for item in batch]
                rows = [prompts[index] for index in group]
                outputs = _continue(begun.repeated(len(group)), tokenizer, rows, stops, max_new_tokens)
                for index, output in zip(group, outputs, strict=True):
                    texts[index] = cut(str(tokenizer.decode(output, skip_special_tokens=True)), stops)
                done(len(texts))
    return [texts[index] for index in range(len(prompts))]


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
    penalty = model.generation_config.repetition_penalty  # type: ignore[union-attr]
    process = RepetitionPenaltyLogitsProcessor(penalty) if penalty not in (None, 1.0) else None
    outputs: list[list[int]] = [[] for _ in prompts]

    ended = ending(tokenizer, end_tokens(model), stops)
    active = list(range(len(prompts)))  # indices of the rows that have not ended
    length, caches = len(prompts[0]), takes_cache(model)
    read_at = frequencies(model, length)
    head = last_logits(model, 1)
    for step in range(length, length + max_new_tokens):
        if not caches or frequencies(model, step) != read_at:  # what is cached is not what it would be now
            begun, cache, read_at = 0, empty_cache(model), frequencies(model, step)
        unread = [[*prompts[row], *outputs[row]][begun:] for row in active]
        tokens = torch.tensor(unread, device=model.device)
        held = behind(model, cache, begun, tokens) if caches else {"use_cache": False}
        forward = model(input_ids=tokens, **held, **head)
        logits, begun = forward.logits[:, -1].float(), step
        if process is not None:
            seen = [[*prompts[row], *outputs[row]] for row in active]
            logits = process(torch.tensor(seen, device=model.device), logits)  # type: ignore[arg-type]
        chosen = logits.argmax(-1).tolist()
        for row, token in zip(active, chosen, strict=True):
            outputs[row].append(token)
        kept = [item for item, row in enumerate(active) if not ended(outputs[row])]
        if not kept:
            break
        if len(kept) < len(active):
            select_rows(cache, kept, model.device)
        active = [active[item] for item in kept]
    return outputs


def ending(
    tokenizer: PreTrainedTokenizerBase, ends: Container[int], stops: Sequence[str]
) -> Callable[[Sequence[int]], bool]:
    """Return the function that says whether an output ends, by one of the tokens `ends` or by a stop
    string."""

    def ended(output: Sequence[int]) -> bool:
        text = tokenizer.decode(list(output))
        return output[-1] in ends or any(stop in text for stop in stops if stop)

    return ended


def cut(text: str, stops: Sequence[str]) -> str:
    """Return `text` before the first of the stop strings that is in it."""
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text

"""What engines other than transformers answer to tasks: likelihoods of continuations, and greedy texts.

An engine reads and continues one text after the other. What is read, scored and cut is the same as in
`likelihood.py` and `greedy.py`; a text that several continuations need is read once.

    log p(y | x) = sum_i log softmax(z_i)[y_i],   z_i in fp32, the sum in fp64
"""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitassay.engines.decode import TokenIds, end_tokens
from bitassay.engines.engine import engine_name, engine_of
from bitassay.engines.one_by_one import OneByOneEngine
from bitassay.engines.scores import token_logprobs
from bitassay.errors import BitassayError
from bitassay.evaluation.greedy import cut, ending
from bitassay.evaluation.likelihood import Score
from bitassay.models.positions import context_length


def longest_text(model: PreTrainedModel) -> int | None:
    """Return how many tokens the engine of a model reads at most; None where there is no limit."""
    return getattr(engine_of(model), "longest_text", context_length(model))


def hosted_scores(
    model: PreTrainedModel,
    pairs: Sequence[tuple[TokenIds, TokenIds]],
    *,
    max_length: int,
    done: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """Score every (context, continuation) by the engine of a model, as `continuation_scores` does."""
    engine, scores = engine_of(model), dict[int, Score]()
    by_text: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        text = (*context, *continuation)[-(max_length + 1) :][:-1]
        by_text.setdefault(text, []).append(index)
    for text, asked in by_text.items():
        count = max(len(pairs[index][1]) for index in asked)
        longest = next(c for index in asked if len(c := pairs[index][1]) == count)
        prompt = text[: len(text) - count + 1]
        (read,) = engine.prefill([prompt], [longest])
        best = read.logits.amax(-1)
        for index in asked:
            continuation = pairs[index][1]
            logits = read.logits[count - len(continuation) :]
            chosen = logits[range(len(continuation)), list(continuation)]
            greedy = bool((chosen == best[count - len(continuation) :]).all())
            scores[index] = Score(token_logprobs(logits, continuation).sum().item(), greedy)
        done(len(scores))
    return [scores[index] for index in range(len(pairs))]


def hosted_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenIds],
    *,
    stops: Sequence[str],
    max_new_tokens: int,
    done: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Continue each prompt by the engine of a model, as `greedy_texts` does. Raises BitassayError for a model
    whose generation penalizes repetitions, which engines are not asked for."""
    penalty = model.generation_config.repetition_penalty  # type: ignore[union-attr]
    if penalty not in (None, 1.0):
        raise BitassayError(
            f"the model asks for a repetition penalty of {penalty}, which {engine_name(model)} is not given",
            "tasks that compare likelihoods, or --engine transformers",
        )
    engine, texts = engine_of(model), list[str]()
    ended = ending(tokenizer, end_tokens(model), stops)
    options: dict[str, Any] = {"until": ended} if isinstance(engine, OneByOneEngine) else {}
    for prompt in prompts:
        (made,) = engine.generate([prompt], max_new_tokens=max_new_tokens, **options)
        texts.append(cut(str(tokenizer.decode(list(made.output_ids), skip_special_tokens=True)), stops))
        done(len(texts))
    return texts

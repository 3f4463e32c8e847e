"""Self-speculative greedy decoding: plane 1 drafts, all planes check.

One model in residual codes (`replication/any_precision.py`) is both. Plane 1 writes k tokens, one by one;
one forward of all planes over these k tokens says what it would have chosen after each. The longest beginning
on which both agree stands, and the checker's first token on which they do not: every check gives at least one
token. The output is the greedy text of all planes, up to ties within rounding, since a check computes k + 1
tokens at once.

There is one cache. The drafter attends to keys and values that all planes made of the text so far, which
makes it a better drafter than plane 1 alone; its own are cut off before each check. With c tokens a check on
average, bytes read for each token are

    (k bytes_1 + bytes_all) / c        instead of bytes_all

a bound on the speed of decoding that is limited by reading weights. Speculative decoding: 2211.17192;
drafting with the checker's own layers: 2309.08168.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from bitassay.engines.decode import check_ids, end_tokens, until_end
from bitassay.errors import BitassayError
from bitassay.models.positions import frequencies
from bitassay.quantization.inputs.kv_cache import cache_to_crop
from bitassay.quantization.replication.any_precision import PrecisionPolicy


@dataclass(frozen=True)
class Speculation:
    """The output of greedy decoding; how many tokens were drafted and accepted, in how many checks; bytes of
    weights read for each output token behind the prompt, and what all planes alone would have read."""

    output_ids: tuple[int, ...]
    drafted: int
    accepted: int
    checks: int
    bytes_per_token: float
    plain_bytes_per_token: float

    @property
    def acceptance(self) -> float:
        """Return the share of drafted tokens that were accepted."""
        return self.accepted / max(1, self.drafted)

    @property
    def speed_bound(self) -> float:
        """Return how many times faster than all planes alone, where only reading weights takes time."""
        return self.plain_bytes_per_token / self.bytes_per_token


@torch.inference_mode()
def speculate(
    model: PreTrainedModel,
    reader: PrecisionPolicy,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    draft_tokens: int = 4,
) -> Speculation:
    """Continue a prompt greedily by all planes, drafted by the first. Raises BitassayError as `generate`
    does."""
    if max_new_tokens < 1 or draft_tokens < 1:
        raise BitassayError(f"{max_new_tokens} new tokens, drafts of {draft_tokens}", "at least 1 of each")
    check_ids(model, [prompt], max_new_tokens - 1)
    ends, cache, output = end_tokens(model), cache_to_crop(model), list[int]()
    text = list[int]()  # what the cache holds
    drafted = accepted = checks = 0

    def choose(tokens: Sequence[int], depth: int) -> list[int]:
        """What follows each of these tokens."""
        nonlocal cache
        unread = [*tokens]
        if frequencies(model, len(text) + len(tokens)) != frequencies(model, max(1, len(text))):
            unread, cache = [*text, *tokens], cache_to_crop(model)
        with reader.reading(depth):
            ids = torch.tensor([unread], device=model.device)
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
        text.extend(tokens)
        return logits[-len(tokens) :].argmax(-1).tolist()

    def forget(count: int) -> None:
        cache.crop(-count)
        del text[len(text) - count :]

    output.append(choose(prompt, reader.planes)[-1])
    before = reader.by_forward + reader.forwards * reader.other_bytes
    while len(output) < max_new_tokens and output[-1] not in ends:
        draft: list[int] = []
        checked = len(text) + 1  # tokens of the text when the last one of the output has been read
        # The check adds one token of its own, and reads all of its tokens at the same frequencies.
        for position in range(min(draft_tokens, max_new_tokens - len(output) - 1)):
            if frequencies(model, checked + position + 1) != frequencies(model, checked):
                break
            draft.append(choose([draft[-1] if draft else output[-1]], 1)[0])
            if draft[-1] in ends:
                break
        forget(len(draft))
        wanted = choose([output[-1], *draft], reader.planes)
        agreed = next((n for n, token in enumerate(draft) if token != wanted[n]), len(draft))
        output += [*draft[:agreed], wanted[agreed]]
        forget(len(draft) - agreed)
        drafted, accepted, checks = drafted + len(draft), accepted + agreed, checks + 1
        output = until_end(output, list(ends)) if ends & set(output) else output
    plain = reader.other_bytes + reader.all_bytes
    read = reader.by_forward + reader.forwards * reader.other_bytes - before if checks else plain
    return Speculation(tuple(output), drafted, accepted, checks, read / max(1, len(output) - 1), plain)

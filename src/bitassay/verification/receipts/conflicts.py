"""Equivocation: one key signed two different answers to one request.

A host answers a request once. Two receipts of one key for the same model, nonce, prompt and sampling, that
commit to different tokens, states or claims, show that it answered twice and could choose which to show. The
proof is the two receipts themselves: anybody who has them can check both signatures (`check_conflict`), and
only the owner of the key could have made them. It needs neither the model nor a trace.

What it does not show is why. A host that answers again after a crash signs twice, too, unless it keeps the
first receipt; the verifier's nonce is for one answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bitassay.record.hashing import canonical_json
from bitassay.verification.container import TraceError
from bitassay.verification.receipts.receipt import Receipt, check_signature


@dataclass(frozen=True)
class Conflict:
    """Two receipts of one key for one request; `first` has the smaller commitment."""

    first: Receipt
    second: Receipt

    @property
    def differs(self) -> tuple[str, ...]:
        """Return what the two say differently: fields of the header, or `states`."""
        one, other = (receipt.header.model_dump(mode="json") for receipt in (self.first, self.second))
        fields = [name for name in one if canonical_json(one[name]) != canonical_json(other[name])]
        return (*fields, *(["states"] if self.first.root != self.second.root else []))


def conflicts(receipts: Sequence[Receipt]) -> list[Conflict]:
    """Return one conflict for each request that one key signed several answers to. Copies of a receipt, and
    receipts of different keys, are none. Raises TraceError for a receipt that its key has not signed."""
    answers: dict[object, dict[bytes, Receipt]] = {}
    for receipt in receipts:
        check_signature(receipt)
        answers.setdefault((receipt.key, *_request(receipt)), {})[receipt.commitment] = receipt
    found = (sorted(several.items())[:2] for several in answers.values() if len(several) > 1)
    return [Conflict(first, second) for (_, first), (_, second) in found]


def check_conflict(conflict: Conflict) -> None:
    """Raise the TraceError "no-conflict" unless the two receipts prove that their key equivocated, and
    "bad-signature" or "weak-key" where they prove nothing."""
    if len(conflicts([conflict.first, conflict.second])) != 1:
        raise TraceError("no-conflict", "the receipts are of different keys or requests, or are the same")


def _request(receipt: Receipt) -> tuple[object, ...]:
    """Return what was asked for: the model by its digests, nonce, prompt and sampling."""
    header = receipt.header
    model = header.model.model_copy(update={"name": ""})
    return model, header.nonce, header.prompt_ids, header.sampling.in_effect

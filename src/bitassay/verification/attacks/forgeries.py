"""Attacks on receipts, challenges and openings, and of verifiers that do not work.

The order is that of `receipt.py` and `challenge.py`: the host sends a receipt; the verifier draws a challenge
of it, with a beacon that is younger; the host answers. An attack replaces some of the host's steps. The host
of these attacks knows everything but the verifier's beacon, owns its key, and goes by the real functions
wherever a lie would not help it.

In a committee (`committee/rounds.py`) the dishonest one is a verifier: VERIFIERS judge as many requests, each
with canaries of its own, and the first does not look at them.

**What grinding gains.** A host with b bad positions among n generated ones, k of which are opened, and which
foresees the beacon, needs C(n, k) / C(n - b, k) commitments until none of the bad ones is drawn.
`commitment-ground` makes GRINDS commitments and keeps the best, for another beacon than the one that comes.
`beacon-chosen` answers the challenge that it foresaw.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bitassay.verification.attacks.attack import Setting, attack
from bitassay.verification.attacks.hosts import with_copied_states
from bitassay.verification.committee.rounds import (
    Assignment,
    Expected,
    Report,
    assign,
    honest_canaries_needed,
    report,
    report_commitment,
)
from bitassay.verification.receipts.challenge import GENERATED, PROMPT, Challenge, challenge, opened_positions
from bitassay.verification.receipts.merkle import cell_leaf, merkle_proof, merkle_root
from bitassay.verification.receipts.opening import Opening, cell_indices, encode_opening, open_trace
from bitassay.verification.receipts.proof import SmallProof, small_proof
from bitassay.verification.receipts.receipt import SIGNED, Receipt, commit, encode, trace_leaves
from bitassay.verification.structure import Status
from bitassay.verification.submissions import CommitteeRound, ReceiptResponse
from bitassay.verification.trace import Header, Trace

GRINDS = 32
VERIFIERS = ("verifier-0", "verifier-1", "verifier-2", "verifier-3")
FAILING_CANARIES = 4

Send = Callable[[Trace], Receipt]
Show = Callable[[Trace, Challenge], Opening | None]


def _secret(*words: str) -> bytes:
    """32 bytes that only those know who may: a study has to be repeatable."""
    return hashlib.sha256("\0".join(("bitassay study", *words)).encode()).digest()


HOST = Ed25519PrivateKey.from_private_bytes(_secret("the host's key"))
OTHER = Ed25519PrivateKey.from_private_bytes(_secret("another key"))


def honest_receipt(trace: Trace) -> Receipt:
    """Return the receipt of `trace`, signed with the host's key."""
    return commit(trace, HOST)


def exchange(trace: Trace, send: Send = honest_receipt, show: Show = open_trace) -> ReceiptResponse:
    """Run one request from receipt to opening; the defaults are an honest host's."""
    receipt = send(trace)
    asked = ask(receipt, _secret("the verifier's beacon", trace.header.nonce))
    opening = show(trace, asked)
    known = HOST.public_key().public_bytes_raw()
    return ReceiptResponse(
        encode(receipt), asked, None if opening is None else encode_opening(opening), known
    )


def ask(receipt: Receipt, beacon: bytes) -> Challenge:
    """Draw a challenge of the usual size, or of half the positions where that is less."""
    n_prompt, n = len(receipt.header.prompt_ids), len(receipt.header.positions)
    generated, prompt = min(GENERATED, ceil((n - n_prompt) / 2)), min(PROMPT, ceil(n_prompt / 2))
    return challenge(receipt, beacon=beacon, generated=max(generated, 1), prompt=prompt)


def show_without_checks(trace: Trace, asked: Challenge, leaves: Sequence[bytes] | None = None) -> Opening:
    """Return the opening of `trace` as if the challenge were for it. leaves: those of the tree behind the
    root, where they are not the trace's."""
    positions = opened_positions(asked, trace.header)
    indices = cell_indices(positions, len(trace.header.layers))
    states = {layer: trace.states[layer][list(positions)] for layer in trace.header.layers}
    proof = merkle_proof(trace_leaves(trace) if leaves is None else leaves, indices)
    return Opening(asked.commitment, asked.beacon, states, tuple(proof))


def sign(header: Header, root: bytes, key: Ed25519PrivateKey = HOST) -> Receipt:
    """Sign a receipt of any root under any header."""
    unsigned = Receipt(header, root, key.public_key().public_bytes_raw())
    return replace(unsigned, signature=key.sign(SIGNED + unsigned.commitment))


# --- the receipt ---


@attack("receipt-tampered", "a field of the header changed after signing", structural=True)
def tampered(setting: Setting) -> list[ReceiptResponse]:
    """A field in turn: tokens, nonce, weights, sampling, numerics."""

    def send(trace: Trace, index: int) -> Receipt:
        header = trace.header
        changes = (
            {"output_ids": (*header.output_ids[:-1], header.output_ids[-1] ^ 1)},
            {"prompt_ids": (header.prompt_ids[0] ^ 1, *header.prompt_ids[1:])},
            {"nonce": header.nonce[1:]},
            {"model": header.model.model_copy(update={"weights_digest": header.model.weights_digest[::-1]})},
            {"sampling": header.sampling.model_copy(update={"seed": header.sampling.seed + 1})},
            {"numerics": header.numerics.model_copy(update={"threads": header.numerics.threads + 1})},
        )
        signed = commit(trace, HOST)
        return replace(signed, header=header.model_copy(update=changes[index % len(changes)]))

    return [
        exchange(trace, partial(send, index=index), show_without_checks)
        for index, trace in enumerate(setting.honest)
    ]


@attack("receipt-other-key", "signed by another key than the host's", structural=True)
def other_key(setting: Setting) -> list[ReceiptResponse]:
    return [exchange(trace, partial(commit, key=OTHER)) for trace in setting.honest]


@attack("receipt-replayed", "receipt and opening of another request", structural=True)
def replayed_receipt(setting: Setting) -> list[ReceiptResponse]:
    return [exchange(trace) for trace in (*setting.honest[1:], setting.honest[0])]


@attack("receipt-second", "a second receipt, signed after the challenge of the first", structural=True)
def second_receipt(setting: Setting) -> list[ReceiptResponse]:
    """The first commits to states of which the host thinks better once it sees what is drawn."""
    return [
        replace(
            exchange(
                with_copied_states(trace),
                show=lambda _, asked, trace=trace: show_without_checks(trace, asked),
            ),
            receipt=encode(commit(trace, HOST)),
        )
        for trace in setting.honest
    ]


# --- the root ---


@attack("root-forged", "a root with nothing behind it, states fitted to the challenge", structural=True)
def forged_root(setting: Setting) -> list[ReceiptResponse]:
    def send(trace: Trace) -> Receipt:
        return sign(trace.header, _secret("no tree", trace.header.nonce))

    return [exchange(trace, send, show_without_checks) for trace in setting.honest]


@attack("root-reordered", "a root over the right leaves in another order", structural=True)
def reordered_root(setting: Setting) -> list[ReceiptResponse]:
    def send(trace: Trace) -> Receipt:
        return sign(trace.header, merkle_root(trace_leaves(trace)[::-1]))

    def show(trace: Trace, asked: Challenge) -> Opening:
        return show_without_checks(trace, asked, trace_leaves(trace)[::-1])

    return [exchange(trace, send, show) for trace in setting.honest]


# --- the opening ---


@attack("opening-withheld", "no opening", structural=True)
def withheld_opening(setting: Setting) -> list[ReceiptResponse]:
    return [exchange(trace, show=lambda *_: None) for trace in setting.honest]


@attack("opening-other-cells", "cells that were committed to, but not those asked for", structural=True)
def other_cells(setting: Setting) -> list[ReceiptResponse]:
    """Each asked position shows the one before it, with the proof of that one."""

    def show(trace: Trace, asked: Challenge) -> Opening:
        n, layers = len(trace.header.positions), trace.header.layers
        positions = sorted((position - 1) % n for position in opened_positions(asked, trace.header))
        proof = merkle_proof(trace_leaves(trace), cell_indices(positions, len(layers)))
        states = {layer: trace.states[layer][positions] for layer in layers}
        return Opening(asked.commitment, asked.beacon, states, tuple(proof))

    return [exchange(trace, show=show) for trace in setting.honest]


@attack("opening-other-states", "states of an honest prefill where others were signed", structural=True)
def other_states(setting: Setting) -> list[ReceiptResponse]:
    def show(trace: Trace, asked: Challenge) -> Opening:
        return show_without_checks(trace, asked, trace_leaves(with_copied_states(trace)))

    return [
        exchange(trace, lambda trace: commit(with_copied_states(trace), HOST), show)
        for trace in setting.honest
    ]


@attack("opening-older", "the answer to an older challenge of the same receipt", structural=True)
def older_opening(setting: Setting) -> list[ReceiptResponse]:
    def show(trace: Trace, asked: Challenge) -> Opening:
        return open_trace(trace, ask(commit(trace, HOST), _secret("an older beacon", asked.beacon)))

    return [exchange(trace, show=show) for trace in setting.honest]


# --- the challenge ---


@attack("beacon-chosen", "bad cells, and a challenge of its own that misses most", structural=True)
def chosen_beacon(setting: Setting) -> list[ReceiptResponse]:
    def show(trace: Trace, asked: Challenge) -> Opening:
        signed, bad = commit(trace, HOST), bad_positions(trace)
        drawn = [ask(signed, _secret("chosen", str(index))) for index in range(GRINDS)]
        return open_trace(trace, min(drawn, key=lambda each: n_bad_opened(each, trace.header, bad)))

    return [exchange(with_bad_cells(trace), show=show) for trace in setting.honest]


@attack("commitment-ground", f"bad cells; the best of {GRINDS} commitments for a beacon that never comes")
def ground_commitment(setting: Setting) -> list[ReceiptResponse]:
    foreseen = _secret("foreseen")
    ground = [grind(trace, foreseen, GRINDS)[0] for trace in setting.honest]
    return [exchange(trace) for trace in ground]


def grind(trace: Trace, foreseen: bytes, tries: int) -> tuple[Trace, int]:
    """Return `trace` with bad cells in the best of `tries` versions, and how many bad positions it opens.

    The versions differ in the first number of a bad cell, so in their commitment; the best one opens the
    fewest bad positions under the beacon `foreseen`.
    """
    bad, trace = bad_positions(trace), with_bad_cells(trace)
    layer, at = trace.header.layers[0], bad[-1]
    leaves, leaf_index = trace_leaves(trace), cell_indices([bad[-1]], len(trace.header.layers))[0]
    rows = trace.states[layer].clone()
    versions: list[tuple[int, torch.Tensor]] = []
    for number in range(tries):
        rows[at, 0] = number  # small whole numbers are exact in every dtype
        state = rows[at].view(torch.uint8).numpy().tobytes()
        leaves[leaf_index] = cell_leaf(layer, at, trace.header.numerics.dtype, state)
        drawn = ask(sign(trace.header, merkle_root(leaves)), foreseen)
        versions.append((n_bad_opened(drawn, trace.header, bad), rows.clone()))
    fewest, best = min(versions, key=lambda version: version[0])
    return replace(trace, states={**trace.states, layer: best}), fewest


def bad_positions(trace: Trace) -> tuple[int, ...]:
    """Return every other generated position, ascending, the last among them."""
    return trace.header.positions[: trace.n_prompt - 1 : -2][::-1]


def with_bad_cells(trace: Trace) -> Trace:
    """Return `trace` with the state of the preceding position at each bad position."""
    bad, states = list(bad_positions(trace)), {}
    for layer, rows in trace.states.items():
        states[layer] = rows.clone()
        states[layer][bad] = rows[[position - 1 for position in bad]]
    return replace(trace, states=states)


def n_bad_opened(asked: Challenge, header: Header, bad: Sequence[int]) -> int:
    """Count the bad positions that the challenge opens."""
    return len(set(bad) & set(opened_positions(asked, header)))


# --- small proofs ---


def proof_of_states(states: torch.Tensor, trace: Trace, receipt: Receipt, size: int) -> SmallProof:
    """Return the proof that a host with these `states` of the last layer at the generated positions sends."""
    header = receipt.header
    return small_proof(
        states,
        header.positions[trace.n_prompt :],
        dtype=header.numerics.dtype,
        nonce=header.nonce,
        commitment=receipt.commitment,
        size=size,
    )


def _last_states(trace: Trace) -> torch.Tensor:
    return trace.states[trace.header.layers[-1]][trace.n_prompt :]


def _copied_proof(trace: Trace, receipt: Receipt, size: int) -> SmallProof:
    """The state of the position before, under the right signs."""
    last = trace.states[trace.header.layers[-1]]
    return proof_of_states(last[trace.n_prompt - 1 : -1], trace, receipt, size)


def _mean_proof(trace: Trace, receipt: Receipt, size: int) -> SmallProof:
    """The mean state, which knows the large numbers that all positions share."""
    last = _last_states(trace)
    return proof_of_states(last.float().mean(0).expand_as(last), trace, receipt, size)


def _replayed_proof(trace: Trace, receipt: Receipt, size: int) -> SmallProof:
    """The right states, under the signs of another receipt."""
    other = replace(receipt, root=_secret("another root"))
    return proof_of_states(_last_states(trace), trace, other, size)


def _guessed_proof(trace: Trace, receipt: Receipt, size: int) -> SmallProof:
    """Random residues, with the right step."""
    honest = proof_of_states(_last_states(trace), trace, receipt, size)
    drawn = hashlib.shake_256(_secret("guess", trace.header.nonce)).digest(len(honest.residues))
    return replace(honest, residues=drawn)


def _fine_proof(trace: Trace, receipt: Receipt, size: int) -> SmallProof:
    """A step so fine that no error could be large."""
    return replace(_guessed_proof(trace, receipt, size), exponent=-100)


def _coarse_proof(trace: Trace, receipt: Receipt, size: int) -> SmallProof:
    """A step so coarse that every residue is 0."""
    honest = proof_of_states(_last_states(trace), trace, receipt, size)
    return SmallProof(100, bytes(len(honest.residues)))


def _ground_proof(trace: Trace, receipt: Receipt, size: int) -> SmallProof:
    """Of GRINDS guesses the one whose residues are nearest to those of the position before: all that a host
    can look for that does not know the state."""
    near = _copied_proof(trace, receipt, size)
    tries = (
        hashlib.shake_256(_secret("grind", trace.header.nonce, str(n))).digest(len(near.residues))
        for n in range(GRINDS)
    )
    positions = len(receipt.header.positions) - trace.n_prompt
    target = near.numbers(positions)

    def far(residues: bytes) -> float:
        d = (SmallProof(0, residues).numbers(positions) - target + 8) % 16 - 8
        return float((d * d).sum())

    return replace(near, residues=min(tries, key=far))


# A forger has not computed the states of the receipt's tokens: of a trace each uses the size of states and
# those of other positions or receipts alone.
FORGED_PROOFS: dict[str, Callable[[Trace, Receipt, int], SmallProof]] = {
    "copied": _copied_proof,
    "mean": _mean_proof,
    "replayed": _replayed_proof,
    "guessed": _guessed_proof,
    "fine": _fine_proof,
    "coarse": _coarse_proof,
    "ground": _ground_proof,
}


# --- verifiers ---

Answers = dict[str, Status]


@attack("verifier-passes-all", "a verifier that says PASS without looking", "PASS", structural=True)
@attack("verifier-fails-all", "a verifier that says FAIL without looking", "FAIL", structural=True)
def without_looking(setting: Setting, answer: Status) -> list[CommitteeRound]:
    return _rounds(setting, lambda assignment, _: dict.fromkeys(assignment.items, answer))


@attack("verifier-copies", "a verifier that copies answers, and says PASS to the rest", structural=True)
def copied_answers(setting: Setting) -> list[CommitteeRound]:
    return _rounds(
        setting, lambda assignment, copied: {item: copied.get(item, "PASS") for item in assignment.items}
    )


@attack("verifier-copies-commitment", "a verifier that hands in another's commitment", structural=True)
def copied_commitment(setting: Setting) -> list[CommitteeRound]:
    """It reveals what the other one revealed, under its own name."""
    rounds = []
    for honest_round in _rounds(setting):
        lazy, other = VERIFIERS[:2]
        theirs = honest_round.revealed[other].model_copy(update={"verifier": lazy})
        copied = {**honest_round.commitments, lazy: honest_round.commitments[other]}
        rounds.append(
            replace(honest_round, commitments=copied, revealed={**honest_round.revealed, lazy: theirs})
        )
    return rounds


@attack("verifier-waits", "a verifier that changes its answers after the others revealed", structural=True)
def changed_answers(setting: Setting) -> list[CommitteeRound]:
    """It passed all; now it knows better."""
    rounds = []
    for lazy, honest in zip(without_looking(setting, "PASS"), _rounds(setting), strict=True):
        late = {**lazy.revealed, VERIFIERS[0]: honest.revealed[VERIFIERS[0]]}
        rounds.append(replace(lazy, revealed=late))
    return rounds


def _rounds(
    setting: Setting, lazy: Callable[[Assignment, Answers], Answers] | None = None
) -> list[CommitteeRound]:
    """Return a round for each request. All verifiers are honest, except for the first where `lazy` is given:
    a function from its assignment and the answers of the second to its own."""
    items = [f"request-{index}" for index in range(len(setting.honest))]
    return [_round(word, items, lazy) for word in setting.nonces]


def _round(
    word: str, items: Sequence[str], lazy: Callable[[Assignment, Answers], Answers] | None = None
) -> CommitteeRound:
    """Run one round, in which every item but the failing canaries should pass."""
    canaries = {name: _canaries(name) for name in VERIFIERS}
    assignments = assign(
        items, canaries, each=len(VERIFIERS) - 1, seed=_secret("the coordinator's seed", word)
    )
    answers: dict[str, Answers] = {
        assignment.verifier: {item: assignment.planted.get(item, "PASS") for item in assignment.items}
        for assignment in assignments
    }
    if lazy is not None:
        answers[VERIFIERS[0]] = lazy(assignments[0], answers[VERIFIERS[1]])
    reports: dict[str, Report] = {
        name: report(name, answered, _secret("salt", word, name)) for name, answered in answers.items()
    }
    commitments = {name: report_commitment(word, revealed) for name, revealed in reports.items()}
    return CommitteeRound(word, VERIFIERS[0], tuple(assignments), commitments, reports)


def _canaries(name: str) -> dict[str, Expected]:
    failures = [f"{name} failure {index}" for index in range(FAILING_CANARIES)]
    honest = [f"{name} honest {index}" for index in range(honest_canaries_needed())]
    canaries: dict[str, Expected] = dict.fromkeys(failures, "FAIL")
    canaries.update(dict.fromkeys(honest, "PASS"))
    return canaries

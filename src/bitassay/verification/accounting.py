"""What counts, and how often: one request once, one prompt once, and requests without a decision too.

    request = SHA-256 of weights, tokenizer and recipe digests, nonce, prompt ids and sampling
    prompt  = SHA-256 of the prompt ids
    output  = SHA-256 of the output ids

A request is named by what a host cannot vary without answering another one. The model's name, numerics and
the digest of the configuration, which older traces leave out, are no part of it, and neither are top-p and
seed where nothing is sampled. Two answers to one request are a *copy*, where the output is the same (and the
commitment, where both are signed), or an *equivocation*. Both count once, as the first answer. An unsigned
trace may be altered by anybody, so the others are named and never held against the host; of a second signed
commitment the host's own key is the proof.

Statistics need exchangeable scores: requests that differ. Of several answers to one prompt under other nonces
only the first counts, too: honest scores of one prompt are alike, and one that is far off by its text would
be taken for evidence again and again.

A request that is not decided upon counts for nothing, and a host could live on that. So each is an item of
its own, if the host could have brought it about (`is_hosts_doing`), and their rate has a budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bitassay.record.hashing import digest_json
from bitassay.verification.numerics import Numerics
from bitassay.verification.profile import Profile, profile_key
from bitassay.verification.trace import Header, ModelClaim, Sampling
from bitassay.verification.verdict import Verdict

UNANSWERED = "unanswered"


@dataclass(frozen=True)
class Answer:
    """What identifies an answer. commitment: in hex, of a receipt whose signature holds; None: unsigned."""

    header: Header
    request: str
    prompt: str
    output: str
    commitment: str | None = None

    @classmethod
    def of(cls, header: Header, commitment: bytes | None = None) -> "Answer":
        """Return the answer with this header."""
        return cls(
            header,
            request_digest(header.model, header.nonce, header.prompt_ids, header.sampling),
            prompt_digest(header.prompt_ids),
            digest_json(list(header.output_ids)),
            None if commitment is None else commitment.hex(),
        )


def request_digest(
    model: ModelClaim, nonce: str | None, prompt_ids: Sequence[int], sampling: Sampling | None
) -> str:
    """Return what names a request. None: the verifier does not know what was asked for."""
    named = [model.weights_digest, model.tokenizer_digest, model.recipe_id]
    asked = sampling and sampling.in_effect.model_dump(mode="json")
    return digest_json([named, nonce, list(prompt_ids), asked])


def prompt_digest(prompt_ids: Sequence[int]) -> str:
    """Return what names a prompt."""
    return digest_json(list(prompt_ids))


@dataclass(frozen=True)
class Standing:
    """What one file counts for. counts: as an answer. scores: in statistics too. note: why not, for people.
    is_fault: whether the host's own signature shows that it answered twice."""

    counts: bool = True
    scores: bool = True
    note: str | None = None
    is_fault: bool = False


def standings(
    answers: Sequence[Answer | None], verdicts: Sequence[Verdict], names: Sequence[str]
) -> list[Standing]:
    """Return what each file of one call counts for. answers: None where no header could be read.

    What fails by exact checks alone takes no other's place, since anybody can spoil a copy, and yields it to
    a sound answer to the same request.
    """
    found: list[Standing] = [Standing()] * len(answers)
    requests: dict[str, tuple[Answer, str]] = {}
    prompts: dict[str, str] = {}
    order = sorted(range(len(answers)), key=lambda index: bool(verdicts[index].structural))
    for index in order:  # sound answers first, otherwise as they came
        answer, name = answers[index], names[index]
        if answer is None:
            continue
        is_sound = not verdicts[index].structural
        if answer.request in requests:
            first, other = requests[answer.request]
            found[index] = compared_with(answer, first.output, first.commitment, other)
        elif is_sound:
            requests[answer.request] = answer, name
            if verdicts[index].p_value is None:
                continue
            if answer.prompt in prompts:
                note = f"repeats the prompt of {prompts[answer.prompt]}; statistics use the first answer"
                found[index] = Standing(scores=False, note=note)
            prompts.setdefault(answer.prompt, name)
    return found


def compared_with(answer: Answer, output: str | None, commitment: str | None, name: str) -> Standing:
    """Return what a second answer to a request counts for. output, commitment: of the first, which is called
    `name`."""
    is_signed = answer.commitment is not None and commitment is not None
    if (answer.commitment == commitment) if is_signed else (answer.output == output):
        return Standing(False, False, f"copy of {name}; one request counts once")
    if is_signed:
        return Standing(True, False, f"equivocation: the host also signed {name} for this request", True)
    note = f"equivocation: another answer than {name} to one request, unsigned, so by anybody; not counted"
    return Standing(False, False, note)


def is_hosts_doing(verdict: Verdict, header: Header, profile: Profile, here: Numerics) -> bool:
    """Return whether the host could have brought about that there is no decision by `profile`, by a verifier
    with the numerics `here`: by other numerics, too short an answer, or states and tokens unlike any that
    calibration saw. What the verifier lacks itself is not the host's doing."""
    codes = {reason.code for reason in verdict.reasons}
    wanted = profile_key(profile.model, profile.prover, here, header.sampling)
    shortest = profile.generated_positions[0]
    can_cause = {
        "unlike-calibration": True,
        "no-configuration": True,
        "no-profile": header.numerics != profile.prover and wanted == profile.key,
        "profile-other-numerics": header.numerics != profile.prover and wanted == profile.key,
        "too-few-tokens": len(header.output_ids) - 1 < shortest < header.sampling.max_new_tokens,
    }
    return verdict.status == "INCONCLUSIVE" and all(can_cause.get(code, False) for code in codes)

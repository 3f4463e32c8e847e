"""A committee of verifiers, none of whom is trusted: they commit before they reveal, and some of what they
judge has a known answer.

    commitment = H("bitassay report 1" | canonical JSON of [round, verifier, salt, answers])

Everybody hands in a commitment; only then does anybody reveal answers and salt. The salt (32 random bytes)
keeps others from trying out the few likely sets of answers; the name in it makes a copied commitment useless
to the copier. Source of the scheme: VeriLLM (arXiv 2509.24257), whose verifiers commit and reveal; canaries
are the "ringers" of Golle and Mironov 2001 (Uncheatable distributed computations).

**Canaries.** Among the items of each verifier are some that the coordinator made (`planted` in the files):
failures that no honest verifier passes (a forged root, a model of two bits), and honest runs. Who passes all
misses the failures, and who fails all refuses the honest ones: a verifier that passes a share s of its items
without looking is detected with probability 1 - (1 - s)^f by f failing canaries. An honest verifier refuses
an honest run at times (alpha), so refusals are judged by their binomial tail.

**Coalitions.** Every item goes to e of n verifiers, and so does every canary, so that nobody can tell one
from the other by who else has it. Verifiers that compare their lists then learn nothing, and what they skip
together is caught as if they were one. c of them are a majority of those that have an item, canary or not,
with probability

    M(c) = sum over k > e/2 of C(c, k) C(n - c, e - k) / C(n, e)         (`majority_share`)

so they decide that share of all items, if they are believed. That needs them to look at every item once:
of those that they pass unseen they are caught as above, where f is now the number of failing canaries that
any of them has, not only one's own. What they can do unpunished is to share the work (one looks, all answer),
and to agree on a lie about items that they know to be real from elsewhere, such as a host's own. Let e be so
large, and a coalition so hard to form, that M(c) is small.

A canary is listed for one verifier, and goes to it and e - 1 others in turn: each of these lacks some of the
canaries that others have (where e < n), so that copied answers do not help.

Left out: canaries must look like the rest, so a host has to sign them like any other request, and each
verifier needs as many. Names stand for people: who may join, and who answers for a name, is decided
elsewhere.
"""

import hashlib
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from math import ceil, comb, log
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from scipy import stats

from bitassay.errors import BitassayError
from bitassay.record.hashing import canonical_json
from bitassay.record.schema import StrictFields
from bitassay.verification.container import first_defect
from bitassay.verification.structure import Reason, Status
from bitassay.verification.trace import Digest

REPORT = b"bitassay report 1\0"
LEVEL = 0.001  # significance level of the test for too many refused honest canaries
ITEMS = 10**6
Expected = Literal["PASS", "FAIL"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Item = Annotated[str, Field(min_length=1, max_length=1024)]
Items = Annotated[tuple[Item, ...], Field(max_length=ITEMS, strict=False)]


class Report(StrictFields):
    """What one verifier found, by the names of its items; with the salt, what it reveals."""

    verifier: str = Field(min_length=1, max_length=128)
    salt: Digest
    answers: dict[str, Status] = Field(max_length=ITEMS)


class Assignment(StrictFields):
    """The items of one verifier in the order in which it gets them; `planted`, the canaries among them with
    their answers, is a secret until all have revealed."""

    verifier: Name
    items: Items
    planted: dict[Item, Expected]


def assign(
    items: Sequence[str], canaries: Mapping[str, Mapping[str, Expected]], *, each: int, seed: bytes
) -> list[Assignment]:
    """Give each item to `each` of the verifiers that `canaries` names, together with these, shuffled.

    canaries: by verifier, items with known answers, each listed once; it goes to that verifier and to others,
    to `each` in all. Give every verifier as many. seed: secret; the draw is by SHA-256 of it.
    """
    names = sorted(canaries)
    planted = [item for several in canaries.values() for item in several]
    if not 0 < each <= len(names) or len({*items, *planted}) != len(items) + len(planted):
        raise BitassayError(
            f"{each} of {len(names)} verifiers for each item, or an item that is given twice",
            "name every item once, and each canary for one verifier",
        )

    def draw(*words: str) -> bytes:
        return hashlib.sha256(seed + canonical_json(words).encode()).digest()

    planted_for: dict[str, dict[str, Expected]] = {name: {} for name in names}
    for owner in names:
        others = cycle(sorted(set(names) - {owner}, key=lambda name: draw("others", owner, name)))
        # Failures first: in turn, each of the others lacks some of them.
        for item in sorted(canaries[owner], key=lambda item: (canaries[owner][item], draw("turn", item))):
            for name in (owner, *islice(others, each - 1)):
                planted_for[name][item] = canaries[owner][item]
    items_of = {name: list(planted_for[name]) for name in names}
    for item in items:
        for name in sorted(names, key=lambda name: draw("who", item, name))[:each]:
            items_of[name].append(item)
    return [
        Assignment(
            verifier=name,
            items=tuple(sorted(items_of[name], key=lambda item: draw("order", item))),
            planted=planted_for[name],
        )
        for name in names
    ]


def report(verifier: str, answers: Mapping[str, Status], salt: bytes | None = None) -> Report:
    """Return a report with a fresh salt, unless one is given."""
    salt = secrets.token_bytes(32) if salt is None else salt
    return parse_report({"verifier": verifier, "salt": salt.hex(), "answers": dict(answers)})


def report_commitment(round: str, revealed: Report) -> str:
    """Return what a verifier hands in before anybody reveals, in hex."""
    content = [round, revealed.verifier, revealed.salt, revealed.answers]
    return hashlib.sha256(REPORT + canonical_json(content).encode()).hexdigest()


def parse_report(content: Any) -> Report:
    """Return a report from plain values that may come from anyone. Raises BitassayError."""
    try:
        parsed = Report.model_validate(content)
        canonical_json(parsed.model_dump()).encode()
        return parsed
    except UnicodeEncodeError as error:
        raise BitassayError("not a report: text that is not Unicode") from error
    except ValidationError as error:
        raise BitassayError(f"not a report: {first_defect(error)}") from error


def judge(
    round: str,
    assignments: Sequence[Assignment],
    commitments: Mapping[str, str],
    revealed: Mapping[str, Report],
    *,
    alpha: float = 0.05,
) -> dict[str, tuple[Reason, ...]]:
    """Return why each verifier's report is not to be used; empty where it is.

    commitments: by verifier, all handed in before the first of `revealed`. alpha: how often an honest
    verifier refuses an honest run; honest canaries must be within its profile.
    """
    reasons = {}
    for assignment in assignments:
        name = assignment.verifier
        reasons[name] = tuple(_defects(round, assignment, commitments.get(name), revealed.get(name), alpha))
    return reasons


def committee_status(
    item: str, revealed: Mapping[str, Report], judged: Mapping[str, tuple[Reason, ...]], quorum: int = 2
) -> Status:
    """Return what more than half of the sound verifiers that had `item` say; INCONCLUSIVE where there is no
    such majority, or there are fewer than `quorum` of them."""
    sound = [name for name, reasons in judged.items() if not reasons and item in revealed[name].answers]
    votes = Counter(revealed[name].answers[item] for name in sound)
    for status in ("PASS", "FAIL"):
        if len(sound) >= quorum and 2 * votes[status] > len(sound):
            return status
    return "INCONCLUSIVE"


def honest_canaries_needed(alpha: float = 0.05) -> int:
    """Return the number of honest canaries without which a verifier that fails all cannot be told from an
    unlucky one."""
    return ceil(log(LEVEL) / log(alpha))


def majority_share(coalition: int, each: int, verifiers: int) -> float:
    """Return the share of all items of which a coalition has more than half of the `each` verifiers."""
    ways = sum(
        comb(coalition, k) * comb(verifiers - coalition, each - k) for k in range(each // 2 + 1, each + 1)
    )
    return ways / comb(verifiers, each)


def _defects(
    round: str, assignment: Assignment, commitment: str | None, revealed: Report | None, alpha: float
) -> list[Reason]:
    if commitment is None:
        return [Reason("no-commitment", "nothing was committed to before the others revealed")]
    if revealed is None:
        return [Reason("withheld-report", "the commitment was never revealed")]
    if revealed.verifier != assignment.verifier or report_commitment(round, revealed) != commitment:
        return [Reason("other-report", "what was revealed is not what this verifier committed to")]
    if set(revealed.answers) != set(assignment.items):
        count = len(set(assignment.items) ^ set(revealed.answers))
        return [Reason("wrong-items", f"{count} answers are missing or were not asked for")]
    reasons, answers = [], revealed.answers
    failures = [item for item, expected in assignment.planted.items() if expected == "FAIL"]
    if missed := sum(answers[item] != "FAIL" for item in failures):
        sentence = f"{missed} of {len(failures)} failing canaries were not noticed"
        reasons.append(Reason("missed-planted-failure", sentence))
    honest = [item for item, expected in assignment.planted.items() if expected == "PASS"]
    refused = sum(answers[item] != "PASS" for item in honest)
    if refused and stats.binom.sf(refused - 1, len(honest), alpha) <= LEVEL:
        sentence = f"{refused} of {len(honest)} honest canaries were refused"
        reasons.append(Reason("refused-planted-honest", sentence))
    return reasons

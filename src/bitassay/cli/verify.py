"""`bitassay verify`: check traces against a model of one's own."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError
from bitassay.record.text import one_line
from bitassay.report.tables import Column, percent, significant

if TYPE_CHECKING:
    from bitassay.verification.verdict import Verdict


def verify(
    traces: list[Path],
    /,
    *,
    model: options.Model,
    recipe: options.RecipeName | None = None,
    profile: Path | None = None,
    profile_signer: str | None = None,
    prompt: str | None = None,
    prompts: Path | None = None,
    nonce: str | None = None,
    max_new_tokens: options.Count | None = None,
    alpha: options.Alpha | None = None,
    receipt: Path | None = None,
    challenge: Path | None = None,
    proof: Path | None = None,
    signer: str | None = None,
    ledger: Path | None = None,
    inconclusive_budget: options.Budget = 0.1,
    unanswered: options.CountFromZero = 0,
    segments: options.Count | None = None,
    sampling: options.AskedSampling = options.AskedSampling(),
    verifier: options.Verifiable = options.Verifiable(),
    output: options.Output = options.Output(),
) -> int:
    """Check TRACES against MODEL: PASS, FAIL or INCONCLUSIVE for each, and what they prove together.

    MODEL, quantized by --recipe where one is named, is the model that should have run. Exit status 0 where
    the decision about all traces together is PASS: an honest host gets FAIL with a probability of at most
    alpha, in the whole call. Of one trace without --ledger its own verdict is the decision. As JSON the
    result has every layer and both VeriLLM rule sets (docs/sources.md).

    Args:
        traces: Trace files, or folders of them; with --receipt, the opening; with --proof, the receipt.
        profile: A calibration profile (default: the one that `bitassay calibrate` kept for model and
            numerics). Without --alpha, its false-positive rate applies.
        profile_signer: The public key in hex that must have signed --profile, of somebody whom you trust to
            calibrate.
        prompt: The prompt that every trace should answer.
        prompts: A file of the prompts that the traces should answer, in order. With --nonce, those that no
            trace answers count as unanswered.
        nonce: The nonce that was requested. With --prompts, "-" and the number of the prompt are appended.
        max_new_tokens: The number of tokens that was requested.
        receipt: The host's signed receipt. TRACES is then the one opening that answers --challenge.
        challenge: The challenge of the receipt that you drew; never a copy from the host.
        proof: The small proof that `bitassay prove --proof` wrote. TRACES is then the one receipt that it
            belongs to; there is no challenge.
        signer: The host's public key in hex, from a source that you trust. Without it nothing signed passes.
        ledger: Keep this host's requests in this file, from call to call, and judge all of them in their
            order. Use one file for each host and profile; no request counts twice.
        inconclusive_budget: The share of requests that may stay without a decision by the host's doing.
        unanswered: Requests, besides those of --prompts, that the host has not answered; each call of a
            ledger counts them.
        segments: Look at so many segments of layers alone, drawn for each trace, and at the tokens by the
            host's own last states. One of four costs about a sixth of a full check; alpha holds, power is
            less.
    """
    if segments is not None and (ledger is not None or receipt is not None or proof is not None):
        other = "--ledger" if ledger is not None else "--receipt" if receipt is not None else "--proof"
        raise BitassayError(
            f"--segments with {other}: segments need whole traces, and a ledger scores of full checks alone",
            f"leave out --segments or {other}",
        )
    if profile_signer is not None and profile is None:
        raise BitassayError("--profile-signer belongs to a file", "--profile FILE --profile-signer KEY")
    is_signed = any(option is not None for option in (receipt, challenge, proof, signer))
    if proof is not None and (receipt is not None or challenge is not None or len(traces) != 1):
        raise BitassayError(
            "a proof is of one receipt, and answers no challenge",
            "bitassay verify RECEIPT --proof FILE --signer KEY --model MODEL",
        )
    if is_signed and proof is None and (receipt is None or challenge is None or len(traces) != 1):
        raise BitassayError(
            "a receipt is verified by one opening and the challenge that it answers",
            "bitassay verify OPENING --receipt FILE --challenge FILE --signer KEY --model MODEL",
        )
    paths = traces if is_signed else trace_files(traces, may_be_none=bool(unanswered or (prompts and nonce)))
    check_words([model], [recipe], file=ledger, texts=[prompts])
    from bitassay.verification.asked import Asked, SignedRequest
    from bitassay.verification.ledger import read_ledger
    from bitassay.verification.profile import read_profile
    from bitassay.verification.receipts.challenge import read_challenge
    from bitassay.verification.receipts.keys import public_key
    from bitassay.verification.trace_files import Keeping, verify_files

    signed = None
    drawn = None if challenge is None else read_challenge(challenge)
    known = None if signer is None else public_key(signer)
    if proof is not None:
        signed = SignedRequest(traces[0], known, proof=proof)
    elif receipt is not None:
        signed = SignedRequest(receipt, known, drawn)
    if signed is not None and not signed.path.is_file():  # a missing opening is the host's fault
        raise BitassayError(f"{signed.path}: no such file", "the receipt that the host sent")
    host = signer
    asked = Asked.of(
        len(paths), prompt, prompts, nonce, max_new_tokens, sampling.asked, unanswered, may_miss=not is_signed
    )
    vouched = None if profile_signer is None else public_key(profile_signer)
    calibrated = read_profile(profile, vouched) if profile else None
    verifier.check()  # before the ledger is opened
    if ledger is not None:
        read_ledger(ledger, calibrated, host, inconclusive_budget)  # before the model is loaded
    with show_progress() as progress:
        result = verify_files(
            paths,
            verifier.load(model, recipe, progress=progress),
            asked,
            name=model,
            receipt=signed,
            profile=calibrated,
            alpha=alpha,
            keeping=Keeping(ledger, host, inconclusive_budget),
            segments=segments,
            progress=progress,
        )
    judged = list(zip(map(str, paths), result.verdicts, result.notes, strict=True))
    content = {
        "rows": [
            {"trace": path, **verdict.to_dict(), "notes": list(notes)} for path, verdict, notes in judged
        ],
        "pooled": result.pooled.to_dict() if result.pooled else None,
        "sequential": result.sequential.to_dict() if result.sequential else None,
        "undecided": result.undecided.to_dict() if result.undecided else None,
        "decision": result.decision.to_dict(),
    }
    output.emit(([_row(*each) for each in judged], COLUMNS), json=content)
    if len(judged) != 1 or ledger:
        found = {
            "as a set": result.pooled,
            "in sequence": result.sequential or "no trace could be scored",
            "undecided": result.undecided,
        }
        for what, said in found.items():
            if said is not None:
                print(f"{what:<14}{one_line(str(said))}", file=sys.stderr)
    print(f"decision: {one_line(str(result.decision))}", file=sys.stderr)
    return 0 if result.passed else 1


COLUMNS = (
    Column("trace", "trace", align="left"),
    Column("status", "verdict", align="left"),
    Column("p_value", "p", significant(2)),
    Column("output_tokens", "tokens"),
    Column("hidden_distance", "distance\nlast layer", significant(3)),
    Column("mean_margin", "margin\nnats", significant(2)),
    Column("accept_rate_paper", "VeriLLM\npaper", percent(0)),
    Column("accept_rate_documents", "VeriLLM\ndocuments", percent(0)),
    Column("fits_best", "fits best", align="left"),
    Column("reason", "why", align="left"),
)


def trace_files(paths: list[Path], may_be_none: bool = False) -> list[Path]:
    """Return the files named, and those in the folders named, sorted. Raises BitassayError for a path that
    does not exist, or a folder without traces unless that may be."""
    files = []
    for path in paths:
        inside = sorted(path.glob("*.trace")) if path.is_dir() else [path]
        if may_be_none and path.is_dir() and not inside:
            continue
        if not inside or not (inside[0].exists() or inside[0].is_symlink()):
            raise BitassayError(
                f"{path}: no trace there", "give the files or the folder that `bitassay prove --out` wrote"
            )
        files += inside
    if not files and not may_be_none:
        raise BitassayError("no traces were given", "bitassay verify TRACE... --model MODEL")
    return files


def _row(path: str, verdict: "Verdict", notes: tuple[str, ...]) -> dict[str, Any]:
    return {
        "trace": path,
        "status": verdict.status,
        "p_value": verdict.p_value,
        "output_tokens": verdict.n_tokens,
        "hidden_distance": verdict.hidden_distance,
        "mean_margin": verdict.mean_margin,
        "accept_rate_paper": verdict.accept_rate("paper"),
        "accept_rate_documents": verdict.accept_rate("documents"),
        "fits_best": str(verdict.attribution) if verdict.attribution and verdict.status == "FAIL" else None,
        "code": ", ".join(reason.code for reason in verdict.reasons),
        "reason": "; ".join([*(reason.sentence for reason in verdict.reasons), *notes]),
    }

"""`bitassay verify`: check traces against a model of one's own."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitassay.cli.checks import check_words
from bitassay.cli.options import Alpha, Count, Model, Output, RecipeName, Verifiable
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError
from bitassay.report.tables import Column, percent, significant

CHUNK = 64  # traces in memory at a time

if TYPE_CHECKING:
    from bitassay.verification.ledger import Line
    from bitassay.verification.profile import Profile
    from bitassay.verification.verdict import Verdict


def verify(
    traces: list[Path],
    /,
    *,
    model: Model,
    recipe: RecipeName | None = None,
    profile: Path | None = None,
    prompt: str | None = None,
    prompts: Path | None = None,
    nonce: str | None = None,
    max_new_tokens: Count | None = None,
    alpha: Alpha | None = None,
    receipt: Path | None = None,
    challenge: Path | None = None,
    signer: str | None = None,
    ledger: Path | None = None,
    verifier: Verifiable = Verifiable(),
    output: Output = Output(),
) -> int:
    """Check TRACES against MODEL: PASS, FAIL or INCONCLUSIVE for each, and what they prove together.

    MODEL, quantized by --recipe where one is named, is the model that should have run. Exit status 0 where
    all traces pass and the sequence of them raises no alarm. As JSON the result has every layer and both
    VeriLLM rule sets (docs/sources.md).

    Args:
        traces: Trace files, or folders of them; with --receipt, the opening.
        profile: A calibration profile (default: the one that `bitassay calibrate` kept for model and
            numerics). Without --alpha, its false-positive rate applies.
        prompt: The prompt that every trace should answer.
        prompts: A file of the prompts that the traces should answer, in order.
        nonce: The nonce that was requested. With --prompts, "-" and the number of the prompt are appended.
        max_new_tokens: The number of tokens that was requested.
        receipt: The host's signed receipt. TRACES is then the one opening that answers --challenge.
        challenge: The challenge of the receipt that you drew; never a copy from the host.
        signer: The host's public key in hex, from a source that you trust. Without it nothing signed passes.
        ledger: Keep the scores of this host's requests in this file, from call to call, and judge all of them
            in their order. Use one file for each host and profile; no trace counts twice.
    """
    if (signed := receipt is not None or challenge is not None or signer is not None) and (
        receipt is None or challenge is None or len(traces) != 1
    ):
        raise BitassayError(
            "a receipt is verified by one opening and the challenge that it answers",
            "bitassay verify OPENING --receipt FILE --challenge FILE --signer KEY --model MODEL",
        )
    paths = traces if signed else trace_files(traces)
    check_words([model], [recipe], file=ledger, texts=[prompts])
    import numpy as np

    from bitassay.verification.ledger import check_ledger, extended, scored, update_ledger
    from bitassay.verification.pooled import pooled_verdict
    from bitassay.verification.profile import ALPHA, read_profile
    from bitassay.verification.receipts.challenge import read_challenge
    from bitassay.verification.receipts.keys import public_key
    from bitassay.verification.sequential import SequentialEvidence

    if receipt is not None and not receipt.is_file():  # a missing opening is the host's fault, this is not
        raise BitassayError(f"{receipt}: no such file", "the receipt that the host sent")
    drawn = read_challenge(challenge) if challenge else None
    key = None if signer is None else public_key(signer)
    host = signer.lower() if signer else None
    requests = _requests(len(paths), prompt, prompts, nonce, max_new_tokens)
    calibrated = read_profile(profile) if profile else None
    verifier.check()  # an unknown device or attention is refused before the ledger is read
    if ledger is not None:
        check_ledger(ledger, calibrated, host)
    verdicts: list[Verdict] = []
    lines: list[Line] = []
    scale: Profile | None = None
    with show_progress() as progress:
        loaded = verifier.load(model, recipe, progress=progress)
        how: dict[str, Any] = {"profile": calibrated, "alpha": alpha}
        for start in range(0, len(paths), CHUNK):
            chunk = slice(start, start + CHUNK)
            if receipt is not None:
                how |= {"signer": key, "request": requests[0]}
                new = [_receipt_verdict(paths[0], receipt, drawn, loaded, model, **how)]
            else:
                how |= {"requests": requests[chunk], "progress": progress}
                new = _verdicts(paths[chunk], loaded, model, **how)
            verdicts += new
            scale = scale or next((verdict.calibration for verdict in new if verdict.calibration), None)
            if scale:
                scores = scored(new, scale)
                lines = (
                    update_ledger(ledger, scores, scale, host) if ledger else extended(lines, scores, scale)
                )
    level = alpha or (scale.alpha if scale else ALPHA)
    together = SequentialEvidence.of(np.array([line.log_wealth for line in lines]), level) if lines else None
    pooled = pooled_verdict(verdicts, level)
    judged = list(zip(map(str, paths), verdicts, strict=True))
    whole: dict[str, Any] = {
        "rows": [{"trace": path, **verdict.to_dict()} for path, verdict in judged],
        "pooled": pooled.to_dict(),
        "sequential": together.to_dict() if together else None,
    }
    output.emit(([_row(path, verdict) for path, verdict in judged], COLUMNS), json=whole)
    if len(verdicts) > 1 or ledger:
        print(f"as a set      {pooled}", file=sys.stderr)
        print(f"in sequence   {together or 'no trace could be scored'}", file=sys.stderr)
    passed = all(verdict.status == "PASS" for verdict in verdicts)
    return 0 if passed and not (together and together.alarm_at) else 1


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


def trace_files(paths: list[Path]) -> list[Path]:
    """Return the files named, and those in the folders named, sorted. Raises BitassayError for a path that
    does not exist or a folder without traces."""
    files = []
    for path in paths:
        inside = sorted(path.glob("*.trace")) if path.is_dir() else [path]
        if not inside or not inside[0].exists():
            raise BitassayError(
                f"{path}: no trace there", "give the files or the folder that `bitassay prove --out` wrote"
            )
        files += inside
    if not files:
        raise BitassayError("no traces were given", "bitassay verify TRACE... --model MODEL")
    return files


def _verdicts(
    paths: list[Path], loaded: Any, model: str, *, requests: list[Any], **how: Any
) -> "list[Verdict]":
    """Return a verdict for each file: FAIL for one that is not a trace."""
    from bitassay.verification.trace import TraceError, read_trace
    from bitassay.verification.verdict import failed, verify_many

    verdicts, readable = {}, {}
    for index, path in enumerate(paths):
        try:
            readable[index] = read_trace(path)
        except TraceError as error:
            verdicts[index] = failed(error, model)
    requested = [requests[index] for index in readable]
    checked = verify_many(list(readable.values()), loaded, requests=requested, **how)
    verdicts |= dict(zip(readable, checked, strict=True))
    return [verdicts[index] for index in range(len(paths))]


def _receipt_verdict(
    opening: Path, receipt: Path, challenge: Any, loaded: Any, model: str, **how: Any
) -> "Verdict":
    """Return the verdict on an opening: FAIL where it or the receipt cannot be read."""
    from bitassay.verification.container import TraceError
    from bitassay.verification.receipts.audit import verify_opening
    from bitassay.verification.receipts.opening import read_opening
    from bitassay.verification.receipts.receipt import read_receipt
    from bitassay.verification.verdict import failed

    try:
        signed = read_receipt(receipt)
        opened = read_opening(opening, signed, challenge)
    except TraceError as error:
        return failed(error, model)
    return verify_opening(signed, challenge, opened, loaded, **how)


def _requests(
    count: int, prompt: str | None, prompts: Path | None, nonce: str | None, max_new_tokens: int | None
) -> list[Any]:
    """Return what was requested of each of `count` traces."""
    from bitassay.data.corpora import prompts_from
    from bitassay.verification.structure import Request

    if prompts is None:
        return [Request(prompt, nonce, None, max_new_tokens)] * count
    texts = prompts_from(prompts)
    if prompt is not None or len(texts) != count:
        raise BitassayError(
            f"--prompts names {len(texts)} prompts for {count} traces", "one prompt a trace, and no --prompt"
        )
    nonces = [None if nonce is None else f"{nonce}-{index}" for index in range(count)]
    return [Request(text, word, None, max_new_tokens) for text, word in zip(texts, nonces, strict=True)]


def _row(path: str, verdict: "Verdict") -> dict[str, Any]:
    return {
        "trace": path,
        "status": verdict.status,
        "p_value": verdict.p_value,
        "output_tokens": verdict.n_tokens,
        "hidden_distance": verdict.hidden_distance,
        "mean_margin": verdict.evidence.mean_margin if verdict.evidence else None,
        "accept_rate_paper": verdict.accept_rate("paper"),
        "accept_rate_documents": verdict.accept_rate("documents"),
        "fits_best": str(verdict.attribution) if verdict.attribution and verdict.status == "FAIL" else None,
        "code": ", ".join(reason.code for reason in verdict.reasons),
        "reason": "; ".join(reason.sentence for reason in verdict.reasons),
    }

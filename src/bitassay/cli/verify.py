"""`bitassay verify`: check traces against a model of one's own."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitassay.cli.output import Format, emit
from bitassay.cli.parameters import AS_IT_IS, Count, Device, Loading, Share, StateDtype

CHUNK = 64  # traces in memory at a time

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bitassay.record.progress import Progress
    from bitassay.verification.ledger import Line
    from bitassay.verification.profile import Profile
    from bitassay.verification.verdict import Verdict


def verify(
    traces: list[Path],
    /,
    *,
    model: str,
    recipe: str | None = None,
    profile: Path | None = None,
    prompt: str | None = None,
    prompts: Path | None = None,
    nonce: str | None = None,
    max_new_tokens: Count | None = None,
    alpha: Share | None = None,
    receipt: Path | None = None,
    challenge: Path | None = None,
    signer: str | None = None,
    ledger: Path | None = None,
    dtype: StateDtype = "bfloat16",
    device: Device = "cpu",
    loading: Loading = AS_IT_IS,
    format: Format = "table",
) -> int:
    """Check TRACES against a model: PASS, FAIL or INCONCLUSIVE for each, and what they prove together.

    Exit status 0 where all pass, and the sequence of them gives no alarm.

    Args:
        traces: Trace files, or folders of them; with --receipt, the opening.
        model: The model that should have run: a name from `bitassay models list`, a folder, a .gguf
            file, a hub id.
        recipe: Expect MODEL quantized by this recipe.
        profile: A calibration profile (default: the one that `bitassay calibrate` kept for model and
            numerics).
        prompt: The prompt that every trace should answer.
        prompts: A file of the prompts that the traces should answer, in order.
        nonce: The nonce that was asked for; with --prompts, "-" and the number of the prompt are
            appended.
        max_new_tokens: The length that was asked for.
        alpha: How often an honest run may be accused (default: the profile's).
        receipt: The host's signed receipt; TRACES is then the one opening that answers --challenge.
        challenge: The challenge of the receipt that you drew; never a copy from the host.
        signer: The host's public key in hex, as you know it from elsewhere. Without it nothing that is
            signed passes.
        ledger: Keep the scores of this host's requests in this file, from call to call, and judge all of
            them in their order. One file for each host and profile; no trace counts twice.
        dtype: The verifier's arithmetic.
        device: Where to run: cpu, cuda, mps.
        format: What to print on stdout; json has everything, layer by layer and by both VeriLLM rule
            sets.
    """
    from bitassay.cli.checks import check_words

    paths = [] if receipt else trace_files(traces)
    check_words([model], None if recipe is None else [recipe], file=ledger, texts=[prompts])
    import numpy as np

    from bitassay.cli.progress import show_progress
    from bitassay.engines.load import load
    from bitassay.models.options import as_device
    from bitassay.quantization.export.fits import check_fit
    from bitassay.quantization.recipe.recipe import find_recipe
    from bitassay.verification.ledger import check_ledger, extended, scored, update_ledger
    from bitassay.verification.pooled import pooled_verdict
    from bitassay.verification.profile import ALPHA, read_profile
    from bitassay.verification.sequential import SequentialEvidence

    signed = _signed_files(traces, receipt, challenge, signer)
    paths = traces if signed else paths
    requests = _requests(len(paths), prompt, prompts, nonce, max_new_tokens)
    known = read_profile(profile) if profile else None
    as_device(device)
    if ledger is not None:
        check_ledger(ledger, known, signer.lower() if signer else None)
    with show_progress() as progress:
        wanted = [find_recipe(recipe)] if recipe else []
        name, trust = loading.of(model), loading.trust_remote_code
        check_fit(name, wanted, trust_remote_code=trust, progress=progress)
        own = load(
            loading.of(model),
            dtype=dtype,
            device=device,
            **loading.options,
            progress=progress,
        )
        if recipe:
            from bitassay.quantization.pipeline import quantize_once

            own = quantize_once(own, recipe, progress=progress)
        host = signer.lower() if signer else None
        verdicts: list[Verdict] = []
        lines: list[Line] = []
        scale: Profile | None = None
        for start in range(0, len(paths), CHUNK):
            chunk = slice(start, start + CHUNK)
            if signed:
                found = [_receipt_verdict(paths[0], *signed, own, model, known, alpha, requests[0])]
            else:
                found = _verdicts(paths[chunk], own, model, known, alpha, requests[chunk], progress)
            verdicts += found
            scale = scale or next((one.calibration for one in found if one.calibration), None)
            if scale:
                new = scored(found, scale)
                lines = update_ledger(ledger, new, scale, host) if ledger else extended(lines, new, scale)
    level = alpha or (scale.alpha if scale else ALPHA)
    together = SequentialEvidence.of(np.array([line.log_wealth for line in lines]), level) if lines else None
    pooled = pooled_verdict(verdicts, level)
    rows = [_row(path, verdict) for path, verdict in zip(paths, verdicts, strict=True)]
    whole: dict[str, Any] = {
        "rows": [{"trace": str(path), **v.to_dict()} for path, v in zip(paths, verdicts, strict=True)],
        "pooled": pooled.to_dict(),
        "sequential": together.to_dict() if together else None,
    }
    emit(rows, _columns(), format, whole=whole)
    if len(verdicts) > 1 or ledger:
        print(f"as a set      {pooled}", file=sys.stderr)
        print(f"in sequence   {together or 'nothing could be scored'}", file=sys.stderr)
    passed = all(verdict.status == "PASS" for verdict in verdicts)
    return 0 if passed and not (together and together.alarm_at) else 1


def trace_files(given: list[Path]) -> list[Path]:
    """The files named, and those in the folders named, sorted. Raises BitassayError for a path that is not
    there or a folder without traces."""
    from bitassay.errors import BitassayError

    found = []
    for path in given:
        inside = sorted(path.glob("*.trace")) if path.is_dir() else [path]
        if not inside or not inside[0].exists():
            raise BitassayError(
                f"{path}: no trace there", "give the files or the folder that `bitassay prove --out` wrote"
            )
        found += inside
    if not found:
        raise BitassayError("no traces were given", "bitassay verify TRACE... --model MODEL")
    return found


def _signed_files(
    traces: list[Path], receipt: Path | None, challenge: Path | None, signer: str | None
) -> tuple[Path, Any, bytes | None] | None:
    """Receipt, challenge and the signer's key, where a receipt is to be verified; None otherwise."""
    from bitassay.errors import BitassayError
    from bitassay.verification.receipts.challenge import read_challenge
    from bitassay.verification.receipts.keys import public_key

    if receipt is None and challenge is None and signer is None:
        return None
    if receipt is None or challenge is None or len(traces) != 1:
        raise BitassayError(
            "a receipt is verified by one opening and the challenge that it answers",
            "bitassay verify OPENING --receipt FILE --challenge FILE --signer KEY --model MODEL",
        )
    if not receipt.is_file():  # an opening that is not there is a host that withholds it
        raise BitassayError(f"{receipt}: no such file", "the receipt that the host sent")
    return receipt, read_challenge(challenge), None if signer is None else public_key(signer)


def _verdicts(
    paths: list[Path],
    own: "PreTrainedModel",
    model: str,
    known: "Profile | None",
    alpha: float | None,
    requests: list[Any],
    progress: "Progress",
) -> "list[Verdict]":
    from bitassay.verification.trace import TraceError, read_trace
    from bitassay.verification.verdict import failed, verify_many

    verdicts, readable = {}, {}
    for index, path in enumerate(paths):
        try:
            readable[index] = read_trace(path)
        except TraceError as error:
            verdicts[index] = failed(error, model)
    asked = [requests[index] for index in readable]
    found = verify_many(
        list(readable.values()), own, profile=known, alpha=alpha, requests=asked, progress=progress
    )
    verdicts |= dict(zip(readable, found, strict=True))
    return [verdicts[index] for index in range(len(paths))]


def _receipt_verdict(
    opening: Path,
    receipt: Path,
    asked: Any,
    signer: bytes | None,
    own: Any,
    model: str,
    profile: Any,
    alpha: float | None,
    request: Any,
) -> "Verdict":
    from bitassay.verification.container import TraceError
    from bitassay.verification.receipts.audit import verify_opening
    from bitassay.verification.receipts.opening import read_opening
    from bitassay.verification.receipts.receipt import read_receipt
    from bitassay.verification.verdict import failed

    try:
        signed = read_receipt(receipt)
        shown = read_opening(opening, signed, asked)
    except TraceError as error:
        return failed(error, model)
    return verify_opening(
        signed, asked, shown, own, signer=signer, profile=profile, alpha=alpha, request=request
    )


def _requests(
    count: int, prompt: str | None, prompts: Path | None, nonce: str | None, max_new_tokens: int | None
) -> list[Any]:
    from bitassay.data.corpora import prompts_from
    from bitassay.errors import BitassayError
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


def _row(path: Path, verdict: "Verdict") -> dict[str, Any]:
    return {
        "trace": str(path),
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


def _columns() -> list[Any]:
    from bitassay.report.tables import Column, percent, significant

    return [
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
    ]

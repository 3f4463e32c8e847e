"""`bitassay prove`: generate, and write traces."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bitassay.cli.checks import check_words
from bitassay.cli.options import Count, Flag, Model, Output, RecipeName, Sampling, Verifiable
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError
from bitassay.report.tables import Column

if TYPE_CHECKING:
    from bitassay.verification.trace import Trace


def prove(
    model: Model,
    *,
    out: Path,
    prompt: str | None = None,
    prompts: Path | None = None,
    recipe: RecipeName | None = None,
    claim: str | None = None,
    max_new_tokens: Count = 32,
    nonce: str = "0",
    batch: Count = 16,
    commit_only: Flag = False,
    key: Path | None = None,
    sampling: Sampling = Sampling(),
    prover: Verifiable = Verifiable(),
    output: Output = Output(),
) -> int:
    """Generate with MODEL and write a trace for each prompt.

    With --prompts, traces that --out already holds are kept: an interrupted command continues when it is run
    again.

    Args:
        out: The trace file for --prompt; the folder of traces for --prompts.
        prompt: One prompt.
        prompts: A file with one prompt a line, or JSON lines with a field `prompt`.
        claim: Write into the trace that this model ran, as a dishonest host would. For tests of the verifier.
        max_new_tokens: Tokens to generate, at most.
        nonce: A word from the verifier. With --prompts, "-" and the number of the prompt are appended.
        batch: Prompts generated at a time.
        commit_only: Keep the traces, and write a signed receipt next to each, named `.receipt`, to send
            instead. `bitassay challenge` then draws the positions that `bitassay open` must show.
        key: The file of the private key that signs receipts. If it does not exist, a key is made, readable to
            you alone.
    """
    if (prompt is None) == (prompts is None):
        raise BitassayError(
            "give either --prompt or --prompts",
            'bitassay prove MODEL --prompt "Why is the sky blue?" --out x.trace',
        )
    if commit_only != (key is not None):
        raise BitassayError("--commit-only and --key go together", "--commit-only --key host.pem")
    file, folder = (out, None) if prompts is None else (None, out)
    check_words([model, claim], [recipe], file=file, folder=folder, texts=[prompts])
    from bitassay.data.corpora import prompts_from
    from bitassay.models.identity import Identity, identity
    from bitassay.models.source import resolve
    from bitassay.verification.prove import prove_many
    from bitassay.verification.receipts.keys import private_key
    from bitassay.verification.trace import check_nonce, write_trace

    texts = prompts_from(prompts) if prompts is not None else [prompt or ""]
    check_nonce(nonce)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampler": sampling.sampler}
    prover.check()  # an unknown device or attention is refused before a key is made
    signing_key = None if key is None else private_key(key)
    with show_progress() as progress:
        claimed = Identity(resolve(claim, progress)) if claim else None
        loaded = prover.load(model, recipe, tokens=max_new_tokens, progress=progress)
        options["claim"] = claimed or identity(loaded)
        if folder is None:
            requests = [_Request(out, texts[0], nonce)]
        else:
            _refuse_other_run(loaded, folder, options)
            requests = [
                _Request(folder / f"{index:05d}.trace", text, f"{nonce}-{index}")
                for index, text in enumerate(texts)
            ]
        rows = {
            request.path: _row(loaded, request.path, trace)
            for request in (requests if folder else ())
            if (trace := _finished(loaded, request))
        }
        missing = [request for request in requests if request.path not in rows]
        for start in range(0, len(missing), batch):
            progress("proving", len(rows), len(requests))
            chunk = missing[start : start + batch]
            prompts_of_chunk, nonces = [each.text for each in chunk], [each.nonce for each in chunk]
            traces = prove_many(loaded, prompts_of_chunk, nonces=nonces, batch_size=batch, **options)
            for request, trace in zip(chunk, traces, strict=True):
                write_trace(request.path, trace)
                rows[request.path] = _row(loaded, request.path, trace)
        progress("proving", len(requests), len(requests))
    shown = [rows[request.path] for request in requests]
    columns = [
        Column("trace", "trace", align="left"),
        Column("prompt_tokens", "prompt"),
        Column("output_tokens", "output"),
    ]
    if signing_key is None:
        output.emit((shown, [*columns, Column("text", "text", _shortened, align="left")]))
    else:
        _write_receipts(shown, signing_key)
        output.emit((shown, [*columns, "receipt", Column("receipt_bytes", "bytes"), "public_key"]))
    return 0


class _Request(NamedTuple):
    path: Path
    text: str
    nonce: str


def _refuse_other_run(model: Any, out: Path, options: dict[str, Any]) -> None:
    """Refuse a folder that holds traces of another model, claim or sampling. The traces themselves cannot
    tell: a header is a claim."""
    from bitassay.models.identity import identity
    from bitassay.record.files import read_json, write_json
    from bitassay.verification.numerics import numerics
    from bitassay.verification.trace import ModelClaim, Sampling

    run = {
        "ran": ModelClaim.of(identity(model)).model_dump(),
        "claimed": ModelClaim.of(options["claim"]).model_dump(),
        "numerics": numerics(model).model_dump(),
        "sampling": Sampling.of(options["sampler"], options["max_new_tokens"]).model_dump(),
    }
    path = out / "prove.json"
    if path.is_file() and read_json(path) != run:
        raise BitassayError(
            f"{out} holds traces of another run (see {path.name})", "choose another --out, or remove this one"
        )
    write_json(path, run)


def _finished(model: Any, request: _Request) -> "Trace | None":
    """Return the trace of an earlier run where it is intact and answers this request."""
    from bitassay.engines.prompts import encode_prompt
    from bitassay.verification.trace import TraceError, read_trace

    if not request.path.exists():
        return None
    try:
        trace = read_trace(request.path)
    except TraceError:
        return None  # a damaged trace is made again
    asked = (request.nonce, encode_prompt(model, request.text))
    return trace if (trace.header.nonce, trace.header.prompt_ids) == asked else None


def _write_receipts(rows: list[dict[str, Any]], key: Any) -> None:
    """Write a receipt next to each trace; add its path, its size and the public key to the rows."""
    from bitassay.verification.receipts.receipt import commit, write_receipt
    from bitassay.verification.trace import read_trace

    for row in rows:
        trace = Path(row["trace"])
        path, receipt = trace.with_suffix(".receipt"), commit(read_trace(trace), key)
        write_receipt(path, receipt)
        row |= {"receipt": str(path), "receipt_bytes": path.stat().st_size, "public_key": receipt.key.hex()}


def _row(model: Any, path: Path, trace: "Trace") -> dict[str, Any]:
    from bitassay.models.identity import tokenizer

    return {
        "trace": str(path),
        "prompt_tokens": trace.n_prompt,
        "output_tokens": trace.n_tokens,
        "nonce": trace.header.nonce,
        "text": tokenizer(model).decode(list(trace.header.output_ids), skip_special_tokens=True),
    }


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"

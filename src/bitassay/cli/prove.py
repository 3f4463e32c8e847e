"""`bitassay prove`: generate, and write traces."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from bitassay.cli.output import Format, emit
from bitassay.cli.parameters import AS_IT_IS, Count, Device, Loading, Seed, StateDtype

if TYPE_CHECKING:
    from bitassay.verification.trace import Trace


def prove(
    model: str,
    *,
    out: Path,
    prompt: str | None = None,
    prompts: Path | None = None,
    recipe: str | None = None,
    claim: str | None = None,
    max_new_tokens: Count = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: Seed = 0,
    nonce: str = "0",
    dtype: StateDtype = "bfloat16",
    device: Device = "cpu",
    batch: Count = 16,
    commit_only: Annotated[bool, Parameter(negative=())] = False,
    key: Path | None = None,
    loading: Loading = AS_IT_IS,
    format: Format = "table",
) -> int:
    """Generate with MODEL and write a trace for each prompt.

    With --prompts, traces that --out holds already are kept: the same command goes on where it was stopped.

    Args:
        model: A name from `bitassay models list`, a folder, a .gguf file or a hub id.
        out: The trace file for --prompt; the folder of traces for --prompts.
        prompt: One prompt.
        prompts: A file with one prompt a line, or JSON lines with a field `prompt`.
        recipe: Quantize MODEL by this recipe first.
        claim: Say in the trace that this model ran, as a dishonest host would. For tests of the
            verifier.
        max_new_tokens: Tokens to generate, at most.
        temperature: 0 takes the most likely token.
        top_p: Sample from the most likely tokens that have this probability together.
        seed: Of the sampling.
        nonce: A word from the verifier; with --prompts, "-" and the number of the prompt are
            appended.
        dtype: Arithmetic, and the dtype of the states in the trace.
        device: Where to run: cpu, cuda, mps.
        batch: Prompts generated at a time.
        commit_only: Keep the traces, and write a signed receipt beside each, named `.receipt`, to send
            instead. `bitassay challenge` then draws what `bitassay open` must show.
        key: The file of the private key that signs receipts; made, readable to you alone, where there
            is none.
        format: What to print on stdout.
    """
    from bitassay.cli.checks import check_words
    from bitassay.errors import BitassayError

    if (prompt is None) == (prompts is None):
        raise BitassayError(
            "give either --prompt or --prompts",
            'bitassay prove MODEL --prompt "Why is the sky blue?" --out x.trace',
        )
    if commit_only != (key is not None):
        raise BitassayError("--commit-only and --key go together", "--commit-only --key host.pem")
    many = prompts is not None
    check_words(
        [model, claim],
        None if recipe is None else [recipe],
        folder=out if many else None,
        file=None if many else out,
        texts=[prompts],
    )
    from bitassay.cli.progress import show_progress
    from bitassay.data.corpora import prompts_from
    from bitassay.engines.load import load
    from bitassay.engines.sampling import Sampler
    from bitassay.models.identity import Identity, identity
    from bitassay.models.options import as_device
    from bitassay.models.source import resolve
    from bitassay.quantization.export.fits import check_fit
    from bitassay.quantization.recipe.recipe import find_recipe
    from bitassay.verification.prove import prove_many
    from bitassay.verification.receipts.keys import private_key
    from bitassay.verification.trace import check_nonce, write_trace

    texts = [prompt] if prompt is not None else prompts_from(prompts)  # type: ignore[arg-type]
    sampler = Sampler(temperature, top_p, seed)
    as_device(device)
    check_nonce(nonce)
    if key is not None:
        private_key(key)  # made now where there is none
    with show_progress() as progress:
        wanted = [find_recipe(recipe)] if recipe else []
        name, trust = loading.of(model), loading.trust_remote_code
        check_fit(name, wanted, tokens=max_new_tokens, trust_remote_code=trust, progress=progress)
        claimed = Identity(resolve(claim, progress)) if claim else None
        loaded = load(name, dtype=dtype, device=device, progress=progress, **loading.options)
        if recipe:
            from bitassay.quantization.pipeline import quantize_once

            loaded = quantize_once(loaded, recipe, progress=progress)
        options = {"max_new_tokens": max_new_tokens, "sampler": sampler, "claim": claimed or identity(loaded)}
        if prompts is None:
            trace = prove_many(loaded, texts, nonces=[nonce], progress=progress, **options)[0]
            write_trace(out, trace)
            rows = [_row(loaded, out, trace)]
        else:
            rows = _prove_folder(loaded, texts, nonce, out, batch, options, progress)
    if key is not None:
        _write_receipts(rows, key)
    emit(rows, _columns(commit_only), format)
    return 0


def _write_receipts(rows: list[dict[str, Any]], key: Path) -> None:
    """A receipt beside each trace; its path and size, and the public key, into the rows."""
    from bitassay.verification.receipts.keys import private_key
    from bitassay.verification.receipts.receipt import commit, write_receipt
    from bitassay.verification.trace import read_trace

    private = private_key(key)
    for row in rows:
        trace = Path(row["trace"])
        path, receipt = trace.with_suffix(".receipt"), commit(read_trace(trace), private)
        write_receipt(path, receipt)
        row |= {"receipt": str(path), "receipt_bytes": path.stat().st_size, "public_key": receipt.key.hex()}


def _prove_folder(
    model: Any, texts: list[str], nonce: str, out: Path, batch: int, options: dict[str, Any], progress: Any
) -> list[dict[str, Any]]:
    """Prove what `out` does not hold yet, batch by batch, and return a row for each prompt."""
    from bitassay.verification.prove import prove_many
    from bitassay.verification.trace import write_trace

    _same_run(model, out, options)
    paths = [out / f"{index:05d}.trace" for index in range(len(texts))]
    nonces = [f"{nonce}-{index}" for index in range(len(texts))]
    rows = {}
    for index, path in enumerate(paths):
        if trace := _finished(model, path, texts[index], nonces[index]):
            rows[index] = _row(model, path, trace)
    todo = [index for index in range(len(texts)) if index not in rows]
    for start in range(0, len(todo), batch):
        progress("proving", len(rows), len(texts))
        chunk = todo[start : start + batch]
        traces = prove_many(
            model, [texts[i] for i in chunk], nonces=[nonces[i] for i in chunk], batch_size=batch, **options
        )
        for index, trace in zip(chunk, traces, strict=True):
            write_trace(paths[index], trace)
            rows[index] = _row(model, paths[index], trace)
    progress("proving", len(texts), len(texts))
    return [rows[index] for index in range(len(texts))]


def _same_run(model: Any, out: Path, options: dict[str, Any]) -> None:
    """Refuse a folder that holds the traces of another model, claim or way of sampling. A trace cannot tell:
    its header is a claim."""
    from bitassay.errors import BitassayError
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


def _finished(model: Any, path: Path, text: str, nonce: str) -> "Trace | None":
    """The trace at `path` where it is whole and answers this request."""
    from bitassay.engines.prompts import encode_prompt
    from bitassay.verification.trace import TraceError, read_trace

    if not path.exists():
        return None
    try:
        trace = read_trace(path)
    except TraceError:
        return None  # what is not whole is made again
    return (
        trace
        if trace.header.nonce == nonce and trace.header.prompt_ids == encode_prompt(model, text)
        else None
    )


def _row(model: Any, path: Path, trace: "Trace") -> dict[str, Any]:
    from bitassay.models.identity import tokenizer

    return {
        "trace": str(path),
        "prompt_tokens": trace.n_prompt,
        "output_tokens": trace.n_tokens,
        "nonce": trace.header.nonce,
        "text": tokenizer(model).decode(list(trace.header.output_ids), skip_special_tokens=True),
    }


def _columns(receipts: bool) -> list[Any]:
    from bitassay.report.tables import Column

    def short(text: str) -> str:
        line = " ".join(text.split())
        return line if len(line) <= 60 else line[:59] + "…"

    shown = [
        Column("trace", "trace", align="left"),
        Column("prompt_tokens", "prompt"),
        Column("output_tokens", "output"),
    ]
    if receipts:
        return [
            *shown,
            Column("receipt", "receipt", align="left"),
            Column("receipt_bytes", "bytes"),
            Column("public_key", "public key", align="left"),
        ]
    return [
        *shown,
        Column("text", "text", short, align="left"),
    ]

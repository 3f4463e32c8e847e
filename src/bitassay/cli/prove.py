"""`bitassay prove`: generate, and write traces."""

from pathlib import Path
from typing import Literal

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError
from bitassay.report.tables import Column


def prove(
    model: options.Model,
    *,
    out: Path,
    prompt: str | None = None,
    prompts: Path | None = None,
    recipe: options.RecipeName | None = None,
    claim: str | None = None,
    engine: str = "transformers",
    max_new_tokens: options.Count = 32,
    nonce: str = "0",
    batch: options.Count = 16,
    commit_only: options.Flag = False,
    key: Path | None = None,
    proof: Literal[2, 8] | None = None,
    sampling: options.ProvenSampling = options.ProvenSampling(),
    prover: options.Verifiable = options.Verifiable(),
    output: options.Output = options.Output(),
) -> int:
    """Generate with MODEL and write a trace for each prompt.

    With --prompts, traces that --out already holds are kept: an interrupted command continues when it is run
    again.

    Args:
        out: The trace file for --prompt; the folder of traces for --prompts.
        prompt: One prompt.
        prompts: A file with one prompt on each line, or JSON lines with a field `prompt`.
        engine: Who runs MODEL: transformers, llama.cpp (a .gguf file), vllm, or a plug-in. The trace's
            numerics say so, and `bitassay calibrate --engine` makes the profile for it.
        claim: Write into the trace that this model ran, as a dishonest host would. For tests of the verifier.
        max_new_tokens: Tokens to generate, at most.
        nonce: A word from the verifier. With --prompts, "-" and the number of the prompt are appended.
        batch: Prompts generated at a time.
        commit_only: Keep the traces, and write a signed receipt next to each, named `.receipt`, to send
            instead. `bitassay challenge` then draws the positions that `bitassay open` must show.
        key: The file of the private key that signs receipts. If it does not exist, a key is made, readable to
            you alone.
        proof: With --commit-only, also write a signed proof of so many bytes a token, named `.proof`, by
            which `bitassay verify` judges a receipt without a challenge.
    """
    if (prompt is None) == (prompts is None):
        raise BitassayError(
            "give either --prompt or --prompts",
            'bitassay prove MODEL --prompt "Why is the sky blue?" --out x.trace',
        )
    if commit_only != (key is not None):
        raise BitassayError("--commit-only and --key go together", "--commit-only --key host.pem")
    if proof and not commit_only:
        raise BitassayError("--proof belongs to a receipt", f"--commit-only --key host.pem --proof {proof}")
    file, folder = (out, None) if prompts is None else (None, out)
    check_words([model, claim], [recipe], file=file, folder=folder, texts=[prompts])
    from bitassay.data.corpora import prompts_from
    from bitassay.models.identity import Identity
    from bitassay.models.source import resolve
    from bitassay.verification.prove_files import PromptFile, prove_files, write_receipts
    from bitassay.verification.receipts.keys import private_key
    from bitassay.verification.trace import check_nonce

    check_nonce(nonce)
    sampler = sampling.sampler
    if prompts is None:
        requests = [PromptFile(out, prompt or "", nonce)]
    else:
        requests = [
            PromptFile(out / f"{index:05d}.trace", text, f"{nonce}-{index}")
            for index, text in enumerate(prompts_from(prompts))
        ]
    prover.check()  # before a key is made
    prover.check_engine(engine, [recipe] if recipe else [])
    signing_key = None if key is None else private_key(key)
    with show_progress() as progress:
        claimed = Identity(resolve(claim, progress)) if claim else None
        loaded = prover.load(model, recipe, tokens=max_new_tokens, engine=engine, progress=progress)
        rows = prove_files(
            loaded,
            requests,
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            claim=claimed,
            batch_size=batch,
            folder=folder,
            progress=progress,
        )
    columns = [
        Column("trace", "trace", align="left"),
        Column("prompt_tokens", "prompt"),
        Column("output_tokens", "output"),
    ]
    if signing_key is None:
        output.emit((rows, [*columns, Column("text", "text", _shortened, align="left")]))
    else:
        rows = write_receipts(rows, signing_key, proof)
        signed = ["receipt", Column("receipt_bytes", "bytes"), "public_key"]
        output.emit((rows, [*columns, *signed, *(["proof"] if proof else [])]))
    return 0


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"

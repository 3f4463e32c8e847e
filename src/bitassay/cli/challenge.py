"""`bitassay challenge`: draw the positions that a host must open."""

from pathlib import Path

from bitassay.cli.checks import check_words
from bitassay.cli.options import Output
from bitassay.errors import BitassayError


def challenge(
    receipt: Path,
    /,
    *,
    out: Path,
    generated: int = 32,
    prompt: int = 8,
    beacon: str | None = None,
    signer: str | None = None,
    output: Output = Output(),
) -> int:
    """Draw positions of the trace behind RECEIPT that its host must open; send the file to the host.

    Args:
        receipt: The receipt that `bitassay prove --commit-only` wrote.
        out: The challenge file.
        generated: Generated positions to open, at most.
        prompt: Prompt positions to open, at most.
        beacon: 32 bytes in hex that nobody could know before you had the receipt (default: fresh random
            ones).
        signer: The host's public key in hex, from a source that you trust. A receipt of another key is
            refused.
    """
    check_words(file=out)
    from bitassay.verification.receipts import challenge as drawing
    from bitassay.verification.receipts.keys import public_key
    from bitassay.verification.receipts.receipt import read_receipt

    signed = read_receipt(receipt)
    if signer is not None and public_key(signer) != signed.key:
        raise BitassayError(f"{receipt}: signed by {signed.key.hex()}", "ask the host which key is its own")
    try:
        seed = None if beacon is None else bytes.fromhex(beacon)
    except ValueError as error:
        raise BitassayError(
            f"--beacon {beacon!r:.80} is not hex", "64 hex digits, or leave it out"
        ) from error
    drawn = drawing.challenge(signed, beacon=seed, generated=generated, prompt=prompt)
    drawing.write_challenge(out, drawn)
    opened = drawing.opened_positions(drawn, signed.header)
    in_prompt = sum(position < len(signed.header.prompt_ids) for position in opened)
    row = {
        "challenge": str(out),
        "prompt_positions": in_prompt,
        "generated_positions": len(opened) - in_prompt,
        "cells": len(opened) * len(signed.header.layers),
        "of_cells": signed.n_cells,
        "signed_by": signed.key.hex(),
        "beacon": drawn.beacon,
    }
    output.emit(([row], [key for key in row if key != "beacon"]))
    return 0

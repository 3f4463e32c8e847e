"""`bitassay challenge`: draw the positions that a host must open."""

from pathlib import Path

from bitassay.cli.output import Format, emit


def challenge(
    receipt: Path,
    /,
    *,
    out: Path,
    generated: int = 32,
    prompt: int = 8,
    beacon: str | None = None,
    signer: str | None = None,
    format: Format = "table",
) -> int:
    """Draw positions of the trace behind RECEIPT that its host must open; send it the file.

    Args:
        receipt: What `bitassay prove --commit-only` wrote.
        out: The challenge file.
        generated: Generated positions to open, at most.
        prompt: Prompt positions to open, at most.
        beacon: 32 bytes in hex that nobody could know before you had the receipt (default: fresh
            random ones).
        signer: The host's public key in hex, as you know it from elsewhere; refuse another one's receipt.
        format: What to print on stdout.
    """
    from bitassay.cli.checks import check_words

    check_words(file=out)
    from bitassay.errors import BitassayError
    from bitassay.report.tables import Column
    from bitassay.verification.receipts import challenge as drawing
    from bitassay.verification.receipts.keys import public_key
    from bitassay.verification.receipts.receipt import read_receipt

    signed = read_receipt(receipt)
    if signer is not None and public_key(signer) != signed.key:
        raise BitassayError(f"{receipt}: signed by {signed.key.hex()}", "ask the host which key is its own")
    try:
        chosen = None if beacon is None else bytes.fromhex(beacon)
    except ValueError as error:
        raise BitassayError(
            f"--beacon {beacon!r:.80} is not hex", "64 hex digits, or leave it out"
        ) from error
    drawn = drawing.challenge(signed, beacon=chosen, generated=generated, prompt=prompt)
    drawing.write_challenge(out, drawn)
    opened = drawing.opened_positions(drawn, signed.header)
    inside = sum(position < len(signed.header.prompt_ids) for position in opened)
    row = {
        "challenge": str(out),
        "prompt_positions": inside,
        "generated_positions": len(opened) - inside,
        "cells": len(opened) * len(signed.header.layers),
        "of_cells": signed.n_cells,
        "signed_by": signed.key.hex(),
        "beacon": drawn.beacon,
    }
    columns = [
        Column("challenge", "challenge", align="left"),
        Column("prompt_positions", "prompt\npositions"),
        Column("generated_positions", "generated\npositions"),
        Column("cells", "cells"),
        Column("of_cells", "of"),
        Column("signed_by", "signed by", align="left"),
    ]
    emit([row], columns, format)
    return 0

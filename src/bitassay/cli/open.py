"""`bitassay open`: show the challenged cells of a trace that was committed to."""

from pathlib import Path

from bitassay.cli.output import Format, emit


def open(trace: Path, /, *, challenge: Path, out: Path, format: Format = "table") -> int:
    """Write the challenged cells of TRACE with the proof that its receipt commits to them.

    Args:
        trace: The trace that `bitassay prove --commit-only` kept.
        challenge: What `bitassay challenge` drew.
        out: The opening, to be sent to the verifier.
        format: What to print on stdout.
    """
    from bitassay.cli.checks import check_words

    check_words(file=out)
    from bitassay.report.tables import Column
    from bitassay.verification.receipts.challenge import opened_positions, read_challenge
    from bitassay.verification.receipts.opening import open_trace, write_opening
    from bitassay.verification.trace import read_trace

    asked, whole = read_challenge(challenge), read_trace(trace)
    write_opening(out, open_trace(whole, asked))
    row = {
        "opening": str(out),
        "positions": len(opened_positions(asked, whole.header)),
        "of_positions": len(whole.header.positions),
        "bytes": out.stat().st_size,
        "trace_bytes": trace.stat().st_size,
    }
    columns = [
        Column("opening", "opening", align="left"),
        Column("positions", "positions"),
        Column("of_positions", "of"),
        Column("bytes", "bytes"),
        Column("trace_bytes", "bytes of\nthe trace"),
    ]
    emit([row], columns, format)
    return 0

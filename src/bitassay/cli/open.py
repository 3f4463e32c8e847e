"""`bitassay open`: show the challenged cells of a trace that was committed to."""

from pathlib import Path

from bitassay.cli.checks import check_words
from bitassay.cli.options import Output


def open(trace: Path, /, *, challenge: Path, out: Path, output: Output = Output()) -> int:
    """Write the challenged hidden states of TRACE, with the proof that its receipt commits to them.

    Args:
        trace: The trace that `bitassay prove --commit-only` kept.
        challenge: The file that `bitassay challenge` wrote.
        out: The opening, to be sent to the verifier.
    """
    check_words(file=out)
    from bitassay.verification.container import FILE_BYTES
    from bitassay.verification.receipts.challenge import opened_positions, read_challenge
    from bitassay.verification.receipts.opening import open_trace, write_opening
    from bitassay.verification.trace import read_trace

    drawn, committed = read_challenge(challenge), read_trace(trace, limit_bytes=FILE_BYTES)
    write_opening(out, open_trace(committed, drawn))
    row = {
        "opening": str(out),
        "positions": len(opened_positions(drawn, committed.header)),
        "of_positions": len(committed.header.positions),
        "bytes": out.stat().st_size,
        "trace_bytes": trace.stat().st_size,
    }
    output.emit(([row], list(row)))
    return 0

"""`bitassay receipts`: what receipts say, without a model."""

from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from bitassay.cli.options import Output
from bitassay.report.tables import Column

if TYPE_CHECKING:
    from bitassay.verification.receipts.receipt import Receipt

receipts = App(name="receipts", help="Check receipts that hosts have signed.")


@receipts.command
def check(files: list[Path], /, *, output: Output = Output()) -> int:
    """Check the signatures of FILES, and find requests that one key has answered twice.

    Two receipts of one key for the same model, nonce, prompt and sampling that commit to different answers
    prove, to anybody who has both, that the owner of the key could choose between answers. Exit status 1
    where there are any, or a file is no receipt.

    Args:
        files: Receipts of one host or of many.
    """
    from bitassay.verification.container import TraceError
    from bitassay.verification.receipts.conflicts import conflicts
    from bitassay.verification.receipts.receipt import read_receipt

    rows, read = [], {}
    for path in files:
        try:
            receipt = read[path] = read_receipt(path)
        except TraceError as error:
            rows.append({"receipt": str(path), "code": error.code, "why": error.problem})
            continue
        rows.append(
            {
                "receipt": str(path),
                "code": "signed",
                "signed_by": receipt.key.hex(),
                "nonce": receipt.header.nonce,
                "output_tokens": len(receipt.header.output_ids),
                "commitment": receipt.commitment.hex(),
            }
        )
    found = [
        {
            "first": _paths(read, conflict.first),
            "second": _paths(read, conflict.second),
            "signed_by": conflict.first.key.hex(),
            "nonce": conflict.first.header.nonce,
            "differs": list(conflict.differs),
        }
        for conflict in conflicts(list(read.values()))
    ]
    columns = (
        "receipt",
        Column("code", "signature", align="left"),
        Column("nonce", "nonce", align="left"),
        Column("output_tokens", "tokens"),
        Column("signed_by", "signed by", align="left"),
        Column("why", "why", align="left"),
    )
    twice = (
        Column("first", "answered twice", ", ".join, align="left"),
        Column("second", "and", ", ".join, align="left"),
        Column("differs", "in", ", ".join, align="left"),
    )
    output.emit((rows, columns), (found, twice), json={"rows": rows, "conflicts": found})
    return 1 if found or len(read) < len(files) else 0


def _paths(read: "dict[Path, Receipt]", receipt: "Receipt") -> list[str]:
    return [str(path) for path, one in read.items() if one == receipt]

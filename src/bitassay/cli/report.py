"""`bitassay report`: run folders to one HTML file."""

from pathlib import Path


def report(*runs: Path, out: Path = Path("report.html")) -> int:
    """Turn run folders into one HTML file that opens offline, and print where it is.

    Args:
        runs: Folders that `bitassay assay` wrote (or their run.json).
        out: The file to write.
    """
    from bitassay.errors import BitassayError
    from bitassay.report.assay import write_report
    from bitassay.report.schema import read_run

    if not runs:
        raise BitassayError("no run folder was given", "bitassay report runs/demo --out report.html")
    write_report([read_run(folder).model_dump(by_alias=True) for folder in runs], out)
    print(out)
    return 0

"""`bitassay report`: run folders to one HTML file."""

from pathlib import Path

from bitassay.cli.checks import check_words


def report(*runs: Path, out: Path = Path("report.html")) -> int:
    """Turn run folders into one HTML file that opens offline, and print its path.

    Every kind of run folder has a page, and several runs of any kind can share one.

    Args:
        runs: Folders that a command of bitassay wrote, or their run.json.
        out: The file to write.
    """
    check_words(file=out)
    from bitassay.report.pages import write_reports

    write_reports(runs, out)
    print(out)
    return 0

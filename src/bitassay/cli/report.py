"""`bitassay report`: run folders to one HTML file."""

from pathlib import Path


def report(*runs: Path, out: Path = Path("report.html")) -> int:
    """Turn run folders into one HTML file that opens offline, and print where it is.

    Args:
        runs: Folders that `bitassay assay` wrote, or one of `bitassay study run task3.1` or `control-table`
            and the like (or their run.json).
        out: The file to write.
    """
    from bitassay.cli.checks import check_words
    from bitassay.errors import BitassayError
    from bitassay.report.assay import write_report
    from bitassay.report.eight_bit import write_eight_bit_report
    from bitassay.report.replication import write_replication_report
    from bitassay.report.schema import EightBitRun, ReplicationRun, read_run

    check_words(file=out)
    if not runs:
        raise BitassayError("no run folder was given", "bitassay report runs/demo --out report.html")
    found = [read_run(folder) for folder in runs]
    pages = {EightBitRun: write_eight_bit_report, ReplicationRun: write_replication_report}
    page = next((write for kind, write in pages.items() for run in found if isinstance(run, kind)), None)
    if page is not None and len(found) > 1:
        raise BitassayError(
            f"a study has a page of its own, {len(found)} runs were given", "report them one by one"
        )
    if page is not None:
        page(found[0].model_dump(by_alias=True), out)
    else:
        write_report([run.model_dump(by_alias=True) for run in found], out)
    print(out)
    return 0

"""`bitassay doctor`: can this machine do the work?"""

import sys

from bitassay.cli.output import Format, emit
from bitassay.report.tables import Column


def doctor(*, format: Format = "table") -> int:
    """Check Python, packages, devices, memory, disk and models, and say which verbs can run here.

    Looks at this machine alone; nothing is fetched. Exit status 3 where something that is needed is missing.

    Args:
        format: What to print on stdout.
    """
    from bitassay.bench.doctor import examine

    columns = (
        Column("subject", "subject", align="left"),
        Column("status", "status", align="left"),
        Column("found", "found", align="left"),
        Column("needed", "needed", align="left"),
        Column("remedy", "try", align="left"),
    )
    findings = examine()
    missing = [finding for finding in findings if finding.status == "missing"]
    emit([finding.to_dict() for finding in findings], columns, format)
    for finding in missing:
        print(f"missing: {finding.subject}: {finding.found}", file=sys.stderr)
    return 3 if missing else 0

"""`bitassay doctor`: can this machine do the work?"""

import sys
from dataclasses import asdict

from bitassay.cli.options import Output


def doctor(*, output: Output = Output()) -> int:
    """Check Python, packages, devices, memory, disk and models, and list the verbs that can run here.

    Only this machine is examined; nothing is fetched. Exit status 3 where something that is needed is
    missing.
    """
    from bitassay.bench.doctor import examine
    from bitassay.cli import VERBS

    findings = examine(verb for verb in VERBS if verb != "doctor")
    rows = [asdict(finding) for finding in findings]
    output.emit((rows, ["subject", "status", "found", "needed", "remedy"]))
    missing = [finding for finding in findings if finding.status == "missing"]
    for finding in missing:
        print(f"missing: {finding.subject}: {finding.found}", file=sys.stderr)
    return 3 if missing else 0

"""Workers of an experiment inside this process, which saves importing everything anew for each."""

import io
import sys
from subprocess import Popen

from bitassay.studies.verillm import worker


class InProcess(Popen):
    """A child process that is none. `started` has the names of the jobs' files."""

    started: list[str]

    def __init__(self, command, **_):
        self.started.append(command[-1].rsplit("/", 1)[1])
        self.command = command

    def communicate(self):
        kept, sys.stderr = sys.stderr, (said := io.StringIO())
        try:
            self.returncode = worker.main(self.command[-1])
        finally:
            sys.stderr = kept
        return None, said.getvalue()

    def terminate(self):
        pass

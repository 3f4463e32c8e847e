"""Helper processes. They end with whoever started them: by `end`, or on their own soon after it was killed.

Popen([sys.executable, "-m", module], env={**os.environ, **helper_variables()})      the parent
end_with_parent()                                               the helper, first thing
"""

import os
import threading
import time
from contextlib import suppress
from subprocess import Popen
from typing import Any

PARENT = "BITASSAY_PARENT"
LOOK_SECONDS = 1.0


def helper_variables() -> dict[str, str]:
    """What the environment of a helper has beside the usual: who started it, which it could not ask for any
    more if that is gone before it looks."""
    return {PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """From now on end this process, whatever it is doing, where the one that started it is gone."""
    parent = int(os.environ.pop(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end(child: "Popen[Any]") -> None:
    """End a process, whatever it is doing, and close its pipes."""
    if child.poll() is None:
        child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with suppress(OSError):  # a pipe to a process that is gone
                stream.close()

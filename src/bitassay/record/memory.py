"""Memory of this process."""

import ctypes
import sys


def release_freed_memory() -> None:
    """Give memory that was freed back to the system. glibc keeps it, for each thread apart, so that the peak
    of a process is what all its threads held at any time, together."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
        if trim is not None:
            trim(0)

"""Memory of this process."""

import ctypes
import sys

LARGE_BYTES = 2**20
M_MMAP_THRESHOLD = -3  # of malloc.h


def release_freed_memory() -> None:
    """Give memory that was freed back to the system. glibc keeps it, for each thread apart, so that the peak
    of a process is what all its threads held at any time, together."""
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


def return_large_blocks() -> None:
    """Give every block of LARGE_BYTES or more back to the system when it is freed, from now on. glibc by
    itself soon keeps blocks of up to 32 MB, and holes are left between those that are in use."""
    if (option := _of_glibc("mallopt")) is not None:
        option(M_MMAP_THRESHOLD, LARGE_BYTES)


def _of_glibc(name: str) -> "ctypes._NamedFuncPointer | None":
    """Return a function that glibc alone has."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None

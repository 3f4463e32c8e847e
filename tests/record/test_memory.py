"""Freed memory goes back to the system."""

import platform
import subprocess
import sys

import pytest

HOLES = """
import resource, sys
from bitassay.record.memory import return_large_blocks

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

if sys.argv[1] == "returned":
    return_large_blocks()
large = bytearray(30 * 2**20)
del large  # glibc learns from it that such blocks come and go
before = resident()
blocks = [bytearray(b"x") * 2**21 for _ in range(40)]
del blocks[::2]
print((resident() - before) / 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc")
def test_large_blocks_leave_no_holes():
    def megabytes(way):
        words = [sys.executable, "-c", HOLES, way]
        return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    assert megabytes("kept") > 70
    assert megabytes("returned") < 45

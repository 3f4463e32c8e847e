"""Helpers whose parent is gone, really."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from bitassay.record.processes import end

HELPER = """
import sys, time
sys.stdin.readline()  # as it would import for seconds
from bitassay.record.processes import end_with_parent
end_with_parent()
print("watching", flush=True)
time.sleep(600)
"""
PARENT = f"""
import os, subprocess, sys, time
from bitassay.record.processes import helper_variables
child = subprocess.Popen([sys.executable, "-c", {HELPER!r}], env={{**os.environ, **helper_variables()}})
print(child.pid, flush=True)
time.sleep(600)
"""


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("watches_first", [True, False])
def test_a_helper_ends_soon_after_its_parent_was_killed(watches_first):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        helper = int(parent.stdout.readline())
        if watches_first:
            print(file=parent.stdin, flush=True)
            assert parent.stdout.readline() == "watching\n"
            assert not is_gone(helper)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        if not watches_first:
            print(file=parent.stdin, flush=True)
        try:
            deadline = time.monotonic() + 60
            while not is_gone(helper):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            if not is_gone(helper):
                os.kill(helper, signal.SIGKILL)


def test_end_ends_what_would_go_on():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.PIPE)
    end(child)
    assert child.returncode == -signal.SIGKILL
    assert child.stdin.closed

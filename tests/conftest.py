"""Fixtures that several folders use."""

import signal

import pytest

from bitassay.testing.tiny import stories260k

# A shell starts background jobs with interrupts ignored, and children inherit that; tests send them some.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def stories():
    """The tiny trained model in fp32; tests must not change it."""
    return stories260k()

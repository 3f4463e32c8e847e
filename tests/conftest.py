"""Fixtures that several folders use."""

import pytest

from bitassay.testing.tiny import stories260k


@pytest.fixture(scope="session")
def stories():
    """The tiny trained model in fp32; tests must not change it."""
    return stories260k()

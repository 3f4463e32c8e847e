"""A fixture for packages of tests: import it into their conftest.py."""

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Tiny models are many times faster on one thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

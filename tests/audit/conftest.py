"""Real servers on 127.0.0.1 that serve stories260k in this process."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import httpx2
import pytest
import torch
import uvicorn

from bitassay import cli
from bitassay.audit.answering import Served, default_context
from bitassay.audit.server import Limits, make_app
from bitassay.audit.store import Store
from bitassay.testing.tiny import stories260k
from bitassay.verification.receipts.keys import private_key

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'developer' %}{{ raise_exception('no developers') }}"
    "{% endif %}{{ message.content }} {% endfor %}"
)


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def running(app, **options):
    """Serve an ASGI application in a thread; yield its address."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none", **options)
    server, listening = uvicorn.Server(config), socket.socket()
    listening.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@contextmanager
def serving(model, folder, limits=Limits(), api_key=None, claim=None, tls=None, **store):  # noqa: B008
    """Serve a model; yield the address and the application."""
    kept = Store(folder, private_key(folder / "key.pem"), **store)
    app = make_app(Served(model, kept, "stories", default_context(model), claim=claim), limits, api_key)
    try:
        with running(app, **(tls or {})) as url:
            yield url, app
    finally:
        app.server.scheduler.stop()


@pytest.fixture(scope="package")
def model(one_thread):
    """stories260k in bf16, with a chat template."""
    loaded = stories260k("bfloat16")
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


@pytest.fixture(scope="package")
def served(model, tmp_path_factory):
    """The address of a server, and its folder."""
    folder = tmp_path_factory.mktemp("served")
    with serving(model, folder, Limits(together=4, waiting=64)) as (url, _):
        yield url, folder


@pytest.fixture
def bitassay_command(capsys):
    """Call `bitassay` with the words of a command line."""

    def call(*words):
        capsys.readouterr()
        status = cli.run(list(words))
        said = capsys.readouterr()
        return SimpleNamespace(status=status, out=said.out, err=said.err)

    return call


@pytest.fixture(scope="package")
def web():
    """A client without the environment's proxies."""
    with httpx2.Client(trust_env=False, timeout=30) as client:
        yield client

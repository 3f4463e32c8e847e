"""Real servers on 127.0.0.1 that serve stories260k in this process."""

from contextlib import contextmanager
from types import SimpleNamespace

import httpx2
import pytest

from bitassay import cli
from bitassay.audit.answering import Served, default_context
from bitassay.audit.server import Limits, make_app
from bitassay.audit.store import Store
from bitassay.testing.local_server import running
from bitassay.testing.tiny import stories260k
from bitassay.verification.receipts.keys import private_key
from threads import one_thread  # noqa: F401 a fixture of this package

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'developer' %}{{ raise_exception('no developers') }}"
    "{% endif %}{{ message.content }} {% endfor %}"
)


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
def model():
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

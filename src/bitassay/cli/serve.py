"""`bitassay serve`: a server of the OpenAI kind that signs its answers."""

import os
import sys
from pathlib import Path

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError, MissingError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    model: options.Model,
    *,
    recipe: options.RecipeName | None = None,
    host: str = "127.0.0.1",
    port: options.CountFromZero = 8000,
    name: str | None = None,
    claim: str | None = None,
    store: Path = Path("bitassay-serve"),
    key: Path | None = None,
    api_key_env: str = "BITASSAY_SERVE_KEY",
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    max_context: options.Count | None = None,
    max_logprobs: options.Count = 20,
    max_body: options.Memory = 2**20,
    together: options.Count = 8,
    waiting: options.Count = 64,
    disk: options.Memory = 10**9,
    trace_hours: float = 24.0,
    prover: options.Verifiable = options.Verifiable(),
) -> int:
    """Serve MODEL over HTTP as OpenAI's API does, with a signed receipt for every answer.

    Completions and chat, streamed or not, with log-probabilities and token ids, for `bitassay audit` and for
    any client of that API (docs/audit.md). A receipt is on the disk before its answer is sent. What is not
    on this computer reaches the server only where --host says so, which needs an API key. Needs the extra
    `serve`.

    Args:
        host: The address to listen on. Others than loopback need the API key.
        port: The port to listen on; 0: any that is free.
        name: The name that clients ask for (default: MODEL's own).
        claim: Write into receipts that this model ran, as a dishonest host would. For tests of audits.
        store: Folder of receipts, traces and the signing key.
        key: The file of the private key that signs (default: key.pem in the store; made where it is missing).
        api_key_env: The environment variable that has the API key, which every request must then show.
        tls_cert: Certificate in PEM, for HTTPS.
        tls_key: The certificate's private key in PEM.
        max_context: Tokens of prompt and answer together, at most (default: the model's, up to 4096).
        max_logprobs: Most likely tokens that a client may ask for at each position.
        max_body: Size of a request's body, at most, such as 1MiB.
        together: Answers that are generated at a time, a token each in turn.
        waiting: Requests that may wait; more are refused with status 429.
        disk: What receipts and traces may take, such as 1GB. The oldest traces go first.
        trace_hours: How long a trace is kept for challenges.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise MissingError(f"serve needs {error.name}", "pip install 'bitassay[serve]'") from error
    check_words([model, claim], [recipe], folder=store)
    api_key = os.environ.get(api_key_env) or None
    if host not in LOOPBACK and api_key is None:
        raise BitassayError(
            f"--host {host} lets others in, and {api_key_env} has no API key",
            f"export {api_key_env}=... with a long random text",
        )
    if (tls_cert is None) != (tls_key is None):
        raise BitassayError("--tls-cert and --tls-key go together", "give both, or neither")
    for path in (tls_cert, tls_key):
        if path is not None and not path.is_file():
            raise BitassayError(f"{path}: no such file", "a PEM file")
    if port > 65535:
        raise BitassayError(f"--port {port}: ports end at 65535", "--port 8000")
    if not trace_hours >= 0:
        raise BitassayError(f"--trace-hours is {trace_hours}", "0 or more")
    from bitassay.audit.answering import Served, default_context
    from bitassay.audit.server import Limits, make_app
    from bitassay.audit.store import Store
    from bitassay.models.identity import Identity, identity
    from bitassay.models.source import resolve
    from bitassay.verification.receipts.keys import private_key

    prover.check()
    kept = Store(store, private_key(key or store / "key.pem"), disk, trace_hours * 3600)
    with show_progress() as progress:
        claimed = Identity(resolve(claim, progress)) if claim else None
        loaded = prover.load(model, recipe, progress=progress)
        progress("hashing the weights")
        stated = claimed or identity(loaded)
        stated.weights_digest  # noqa: B018  once, before the first answer waits for it
    longest = default_context(loaded)
    served = Served(
        loaded, kept, name or stated.name, min(max_context or longest, longest), max_logprobs, claimed
    )
    app = make_app(served, Limits(max_body, together, waiting), api_key)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        limit_concurrency=4 * (together + waiting),
        timeout_graceful_shutdown=5,
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
    )
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    where = f"{'https' if tls_cert else 'http'}://{host}:{socket.getsockname()[1]}/v1"
    signer = kept.key.public_key().public_bytes_raw().hex()
    print(f"serving {served.name} at {where}", file=sys.stderr)
    print(f"receipts in {kept.receipts}, signed by {signer}", file=sys.stderr, flush=True)
    try:
        server.run(sockets=[socket])
    except KeyboardInterrupt:  # how a server is ended
        print("stopped", file=sys.stderr)
    finally:
        app.server.scheduler.stop()
    return 0

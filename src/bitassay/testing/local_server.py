"""A real HTTP server on 127.0.0.1 in a thread of this process, for tests and benchmarks (needs uvicorn)."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def running(app: Any, **options: Any) -> Iterator[str]:
    """Serve an ASGI application on a free port; yield its address. options: further ones of uvicorn."""
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

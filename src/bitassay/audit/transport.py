"""Connections that end in time: a deadline holds for all of a request; one's own certificates are taken.

Time-outs of an HTTP client are those of a single read. A server that sends a byte of its headers now and
then, or one informational answer after the other, keeps each of them and holds the client for ever. Here
every connect, handshake, read and write gets what is left until the deadline of the thread that asks.
"""

import ssl
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpcore2
import httpx2

from bitassay.errors import BitassayError
from bitassay.record.files import explained

CERTIFICATES_BYTES = 2**22


class Deadline(threading.local):
    """When the request of this thread must have ended, by the monotonic clock."""

    until = float("inf")

    def left(self, timeout: float | None) -> float:
        """Return the seconds that an operation may take. Raises httpcore2.ReadTimeout where none are left."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("the deadline has passed")
        return left if timeout is None else min(timeout, left)


class _Stream(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream, deadline: Deadline) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        left = self._deadline.left(timeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore2.SyncBackend):
    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        left = self._deadline.left(timeout)
        return _Stream(super().connect_tcp(host, port, left, local_address, socket_options), self._deadline)


class Transport(httpx2.HTTPTransport):
    """HTTP/1.1 without proxies whose every operation ends at the deadline."""

    def __init__(self, context: ssl.SSLContext, deadline: Deadline) -> None:
        super().__init__(verify=context, trust_env=False)
        self._pool = httpcore2.ConnectionPool(
            ssl_context=context, keepalive_expiry=5, network_backend=_Backend(deadline)
        )


def certificates(ca_file: Path | None) -> ssl.SSLContext:
    """Return who may sign a server's certificate: the public authorities, and those in a PEM file. Raises
    BitassayError for a file that holds none."""
    context = httpx2.create_ssl_context(trust_env=False)
    if ca_file is None:
        return context
    with explained(ca_file), ca_file.open("rb") as file:
        data = file.read(CERTIFICATES_BYTES + 1)
    try:
        context.load_verify_locations(cadata=data[:CERTIFICATES_BYTES].decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise BitassayError(
            f"{ca_file}: holds no certificates", "a PEM file, with BEGIN CERTIFICATE in it"
        ) from error
    return context

"""What a server keeps of its answers: signed receipts, and for a while the traces behind them.

    FOLDER/key.pem                    the signing key, where no other is named
    FOLDER/receipts/COMMITMENT        one for each answer, before the answer is sent
    FOLDER/traces/COMMITMENT          so that a challenge can be opened; the oldest go first

Both together take at most `disk_bytes`. Traces make room for receipts, and receipts are never deleted: a
server whose receipts fill the disk refuses to answer.
"""

import re
import time
from collections import OrderedDict
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bitassay.errors import BitassayError
from bitassay.record.files import explained
from bitassay.verification.receipts.receipt import Receipt, commit, write_receipt
from bitassay.verification.trace import Trace, read_trace, write_trace

DISK_BYTES = 2**30
TRACE_SECONDS = 24 * 3600.0
ID = re.compile("[0-9a-f]{64}")


class Full(BitassayError):
    """Receipts fill the disk that they may have."""


class Store:
    """Receipts and traces in a folder. Raises BitassayError where it cannot be read or written."""

    def __init__(
        self,
        folder: Path,
        key: Ed25519PrivateKey,
        disk_bytes: int = DISK_BYTES,
        trace_seconds: float = TRACE_SECONDS,
    ) -> None:
        self.key, self.disk_bytes, self.trace_seconds = key, disk_bytes, trace_seconds
        self.receipts, self.traces = folder / "receipts", folder / "traces"
        with explained(folder):
            for path in (self.receipts, self.traces):
                path.mkdir(parents=True, exist_ok=True)
            self.receipt_bytes = sum(path.stat().st_size for path in self.receipts.iterdir())
            known = sorted(
                (path.stat().st_mtime, path) for path in self.traces.iterdir() if _is_id(path.name)
            )
            self._sizes = OrderedDict((path.name, path.stat().st_size) for _, path in known)

    @property
    def used_bytes(self) -> int:
        """Return the bytes of all receipts and traces."""
        return self.receipt_bytes + sum(self._sizes.values())

    @property
    def n_traces(self) -> int:
        """Return the number of traces that can be opened."""
        return len(self._sizes)

    def check_room(self) -> None:
        """Raise Full where receipts fill the disk."""
        if self.receipt_bytes >= self.disk_bytes:
            raise Full(
                f"{self.receipts}: receipts take {self.receipt_bytes} of {self.disk_bytes} bytes",
                "move them elsewhere, or give the server a larger --disk",
            )

    def keep(self, trace: Trace) -> Receipt:
        """Sign and keep the receipt of a trace, and the trace; both are on the disk when this returns.
        Raises Full."""
        self.check_room()
        receipt = commit(trace, self.key)
        name = receipt.commitment.hex()
        path = self.receipts / name
        if not path.exists():
            write_receipt(path, receipt)
            self.receipt_bytes += path.stat().st_size
        write_trace(self.traces / name, trace)
        self._sizes[name] = (self.traces / name).stat().st_size
        self._sizes.move_to_end(name)
        self._forget()
        return receipt

    def receipt(self, name: str) -> bytes:
        """Return the receipt of this commitment in hex. Raises LookupError where there is none."""
        path = self.receipts / name
        if not _is_id(name) or not path.is_file():
            raise LookupError(name)
        return path.read_bytes()

    def trace(self, name: str) -> Trace:
        """Return the trace of this commitment in hex. Raises LookupError where it is not kept any more."""
        self._forget()
        if name not in self._sizes:
            raise LookupError(name)
        return read_trace(self.traces / name)

    def _forget(self) -> None:
        """Delete the oldest traces: those that are too old, and those beyond the disk's limit."""
        now = time.time()
        for name in list(self._sizes):
            path = self.traces / name
            age = now - path.stat().st_mtime if path.exists() else self.trace_seconds + 1
            if age <= self.trace_seconds and self.used_bytes <= self.disk_bytes:
                break
            path.unlink(missing_ok=True)
            del self._sizes[name]


def _is_id(name: str) -> bool:
    return ID.fullmatch(name) is not None

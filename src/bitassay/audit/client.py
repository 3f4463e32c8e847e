"""Ask an endpoint that may be hostile: only the URL that was given, bounded answers, named errors.

No redirect is followed, the environment's proxies are not used, and compressed answers are refused. The API
key goes into one header and nowhere else: where a server sends it back, it is taken out of the answer before
anything reads it. The time that an answer may take is that of all of it, from connecting on, so that a server
cannot hold a client by a byte now and then.
"""

import json
import os
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from bitassay.audit.transport import Deadline, Transport, certificates
from bitassay.errors import BitassayError, MissingError

ANSWER_BYTES = 2**24
SECONDS = 120.0
TRIES = 6
AGAIN = (408, 429, 500, 502, 503, 504)
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
EVENTS = "text/event-stream"
SHOWN = 200  # characters of what a server says
HUNG = 2  # tries of a server that takes too long
HINTS = {
    401: "set the API key in the environment variable of --key-env",
    403: "set the API key in the environment variable of --key-env",
    404: "the URL of the API, mostly with /v1 at its end, and the model's name there",
}


class AnswerError(BitassayError):
    """What is wrong with an answer; `code` is short and stable, such as "redirect" or "not-finite"."""

    def __init__(self, code: str, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem} [{code}]", remedy)
        self.code = code


class Endpoint:
    """A server of the OpenAI kind. key_env: the environment variable of its API key; none where it is not
    set. ca_file: certificates (PEM) that may sign the server's, besides the public ones. Raises BitassayError
    for a URL that is none, and a file that holds no certificates."""

    def __init__(
        self,
        url: str,
        key_env: str | None = None,
        *,
        ca_file: Path | None = None,
        seconds: float = SECONDS,
        answer_bytes: int = ANSWER_BYTES,
        tries: int = TRIES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = checked_url(url)
        self.seconds, self.answer_bytes, self.tries, self.sleep = seconds, answer_bytes, tries, sleep
        self._key = (os.environ.get(key_env) or "").strip() if key_env else ""
        headers = {"accept": "application/json", "accept-encoding": "identity", "user-agent": "bitassay"}
        if self._key:
            if not self._key.isascii() or not self._key.isprintable():
                raise BitassayError(f"{key_env}: not an API key", "printable ASCII")
            headers["authorization"] = f"Bearer {self._key}"
        self._deadline = Deadline()
        self._web = httpx2.Client(
            headers=headers,
            follow_redirects=False,
            trust_env=False,
            timeout=httpx2.Timeout(seconds, connect=20),
            transport=Transport(certificates(ca_file), self._deadline),
        )

    def close(self) -> None:
        """Close all connections."""
        self._web.close()

    def get(self, path: str) -> Any:
        """Return the JSON value at a path below the URL. Raises AnswerError."""
        return self._patiently("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Return the JSON value that answers `body`. Raises AnswerError."""
        return self._patiently("POST", path, body)

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """Return the JSON values of the events that answer `body`, streamed. Raises AnswerError."""
        return self._patiently("POST", path, body, EVENTS)

    def _patiently(
        self, method: str, path: str, body: dict[str, Any] | None, kind: str = "application/json"
    ) -> Any:
        """Ask up to `tries` times, with growing pauses, where another try may help."""
        for number in range(1, self.tries + 1):
            try:
                return self._once(method, path, body, kind)
            except _Again as again:
                if number >= (HUNG if again.error.code == "timeout" else self.tries):
                    raise again.error from again
                wait = min(FIRST_WAIT * 2 ** (number - 1), LONGEST_WAIT) * (0.5 + random.random())
                self.sleep(min(max(wait, again.wait), 2 * LONGEST_WAIT))
        raise AssertionError("unreachable")

    def _once(self, method: str, path: str, body: dict[str, Any] | None, kind: str) -> Any:
        try:
            self._deadline.until = time.monotonic() + self.seconds
            headers = {"accept": kind}
            with self._web.stream(method, self.url + path, json=body, headers=headers) as answer:
                return self._checked(answer, path, kind)
        except httpx2.TimeoutException as error:
            problem = f"{self.url}: no whole answer in {self.seconds:g} s"
            raise _Again(AnswerError("timeout", problem, "--timeout with more seconds")) from error
        except httpx2.ConnectError as error:
            if isinstance(_cause(error), ssl.SSLError) or "SSL" in str(error) or "certificate" in str(error):
                problem = f"{self.url}: TLS failed ({self._clean(str(error)):.{SHOWN}})"
                raise AnswerError("tls", problem, "check the host's certificate") from error
            why = f"{self.url}: cannot be reached ({self._clean(str(error)):.{SHOWN}})"
            raise _Again(AnswerError("unreachable", why, "check the URL")) from error
        except httpx2.HTTPError as error:
            said = self._clean(str(error))
            why = f"{self.url}: the connection broke ({type(error).__name__}: {said:.{SHOWN}})"
            is_other = "status line" in said or "without sending a response" in said
            hint = "check whether the server speaks http or https" if is_other else ""
            raise _Again(AnswerError("broken", why, hint)) from error

    def _checked(self, answer: httpx2.Response, path: str, wanted: str) -> Any:
        status, where = answer.status_code, f"{self.url}{path}"
        if 300 <= status < 400:
            raise AnswerError("redirect", f"{where}: a redirect, which is not followed", "give the final URL")
        data = self._bounded(answer, where)
        data = data.replace(self._key.encode(), b"***") if self._key else data
        said = data.decode("utf-8", "replace")
        if status in AGAIN:
            problem = f"{where}: status {status}: {said:.{SHOWN}}"
            raise _Again(
                AnswerError(f"status-{status}", problem), _seconds(answer.headers.get("retry-after"))
            )
        if status != 200:
            problem = f"{where}: status {status}: {said:.{SHOWN}}"
            raise AnswerError(f"status-{status}", problem, HINTS.get(status, ""))
        kind = answer.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != wanted:
            raise AnswerError("wrong-type", f"{where}: {kind!r:.60}, not {wanted}")
        if kind == EVENTS:
            lines = [
                line.removeprefix(b"data:").strip() for line in data.splitlines() if line[:5] == b"data:"
            ]
            return [strict_json(line, where) for line in lines if line != b"[DONE]"]
        return strict_json(data, where)

    def _bounded(self, answer: httpx2.Response, where: str) -> bytes:
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            raise AnswerError("wrong-type", f"{where}: a compressed answer, which was not asked for")
        data = bytearray()
        for chunk in answer.iter_raw():
            data += chunk
            if len(data) > self.answer_bytes:
                raise AnswerError("too-large", f"{where}: an answer of more than {self.answer_bytes} bytes")
        return bytes(data)

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


@dataclass(frozen=True)
class Target:
    """A server: where it is, and the model's name there."""

    endpoint: Endpoint
    model: str


class _Again(Exception):
    """An error after which another try may help, after `wait` seconds."""

    def __init__(self, error: AnswerError, wait: float = 0.0) -> None:
        super().__init__(str(error))
        self.error, self.wait = error, wait


def checked_url(url: str) -> str:
    """Return the URL of an API without a slash at its end. Raises BitassayError for what is none, or has a
    password or a query in it, which would end up in files."""
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise BitassayError("not a URL", "https://host/v1") from error
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise BitassayError(
            "the URL has a password, a query or a fragment, which would be written into files",
            "https://host/v1, and the key in the environment variable of --key-env",
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise BitassayError(f"{url:.100}: not a URL of a server", "https://host/v1")
    return str(parsed).rstrip("/")


def require_variable(key_env: str | None) -> None:
    """Raise MissingError where a variable that the user named is not set."""
    if key_env and not os.environ.get(key_env):
        raise MissingError(f"the environment variable {key_env} is not set", f"export {key_env}=...")


def strict_json(data: bytes, where: str) -> Any:
    """Return a JSON value without NaN, infinity, and names that an object has twice. Half a surrogate pair,
    which no file could hold, becomes U+FFFD. Raises AnswerError."""

    def refuse(constant: str) -> None:
        raise AnswerError("not-finite", f"{where}: {constant} in the answer")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        known = dict(pairs)
        if len(known) < len(pairs):
            raise AnswerError("malformed", f"{where}: an object with the same name twice")
        return known

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse, object_pairs_hook=unique)
        if b"\\ud" in data.lower():
            text = json.dumps(value, ensure_ascii=False).encode("utf-16-le", "surrogatepass")
            value = json.loads(text.decode("utf-16-le", "replace"))
        return value
    except AnswerError:
        raise
    except (ValueError, RecursionError) as error:
        raise AnswerError("not-json", f"{where}: the answer is not JSON") from error


def _seconds(text: str | None) -> float:
    """What a server says how long to wait; a date, or nonsense, says nothing."""
    return float(text) if text and text.isascii() and text.isdigit() and len(text) < 6 else 0.0


def _cause(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        if isinstance(cause, ssl.SSLError):
            return cause
        error = cause
    return error

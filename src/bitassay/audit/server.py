"""`bitassay serve`: a server of the OpenAI kind whose answers can be checked.

    GET  /v1/models              what is served, and the key that signs
    POST /v1/completions         text or token ids, streamed or not
    POST /v1/chat/completions
    GET  /v1/receipts/ID         the signed receipt of an answer
    POST /v1/openings            a challenge (JSON) -> the opening (safetensors)
    GET  /metrics, /health

A receipt is on the disk before the answer, or the last event of a streamed one, is sent. Bodies, contexts,
waiting requests and the disk are bounded. A bad request gets a JSON error with status 4xx; an error of the
server's own, one without details.
"""

import asyncio
import hmac
import json
import logging
import secrets
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from bitassay.audit.answering import Done, Piece, Read, Served, answer
from bitassay.audit.requests import Chat, Completion, Refused, parse
from bitassay.audit.responses import Spelled, error_body, models_body
from bitassay.audit.scheduling import Busy, Job, Scheduler
from bitassay.audit.store import Full
from bitassay.errors import BitassayError
from bitassay.verification.receipts.challenge import CHALLENGE_BYTES, Challenge
from bitassay.verification.receipts.opening import encode_opening, open_trace

LOG = logging.getLogger(__name__)
BODY_BYTES = 2**20
BODY_SECONDS = 30.0
NOT_RECEIVED = 499


@dataclass(frozen=True)
class Limits:
    """together: answers under way at a time; waiting: requests that may wait for their turn."""

    body_bytes: int = BODY_BYTES
    together: int = 8
    waiting: int = 64


class Server:
    """The handlers, what they share, and counts of what has been done."""

    def __init__(self, served: Served, limits: Limits, api_key: str | None) -> None:
        self.served, self.limits = served, limits
        self._api_key = None if api_key is None else api_key.encode()
        self.scheduler = Scheduler(limits.together, limits.waiting)
        self.started = int(time.time())
        self.counts: Counter[str] = Counter()

    async def models(self, request: Request) -> Response:
        return JSONResponse(models_body(self.served, self.started))

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, Completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, Chat)

    async def _answer(self, request: Request, kind: type[Completion] | type[Chat]) -> Response:
        asked = parse(kind, await self._body(request, self.limits.body_bytes))
        if asked.model not in (None, self.served.name):
            raise HTTPException(404, f"no model {asked.model!r:.80}; there is {self.served.name!r}")
        job = self.scheduler.submit(answer(self.served, asked))
        ident = f"{'chatcmpl' if kind is Chat else 'cmpl'}-{secrets.token_hex(12)}"
        results = job.results()
        try:
            read = await self._next(results, request)
            assert isinstance(read, Read)
            self.counts["prompt_tokens_total"] += len(read.ids)
            spelled = Spelled(self.served, asked, read, ident)
            if asked.stream:
                return StreamingResponse(self._events(job, results, spelled), media_type="text/event-stream")
            pieces: list[Piece] = []
            while not isinstance(done := await self._next(results, request), Done):
                pieces.append(done)
        except BaseException:
            job.cancel()
            raise
        self._count(done)
        return JSONResponse(spelled.whole(pieces, done))

    async def _events(self, job: Job, results: AsyncIterator[Any], spelled: Spelled) -> AsyncIterator[str]:
        """Events of a streamed answer. An error on the way is one, since the status has been sent."""
        try:
            for event in spelled.first():
                yield _event(event)
            async for result in results:
                if isinstance(result, Piece):
                    yield _event(spelled.event(result))
                elif isinstance(result, Done):
                    self._count(result)
                    for event in spelled.last(result):
                        yield _event(event)
                    yield "data: [DONE]\n\n"
        except Exception as error:
            status, message = explained(error)
            report(error, status)
            self.counts["failed_streams_total"] += 1
            yield _event(error_body(status, message))
        finally:
            job.cancel()

    async def _next(self, results: AsyncIterator[Any], request: Request) -> Any:
        """The next result of a job; its handler ends where the client has gone."""
        async for result in results:
            if await request.is_disconnected():
                raise ClientDisconnect
            if result is not None:
                return result
        raise AssertionError("a job without an end")

    def _count(self, done: Done) -> None:
        self.counts["generated_tokens_total"] += done.generated
        self.counts["answers_total"] += 1

    async def receipt(self, request: Request) -> Response:
        try:
            data = self.served.store.receipt(request.path_params["name"])
        except LookupError:
            raise HTTPException(404, "no such receipt") from None
        return Response(data, media_type="application/json")

    async def opening(self, request: Request) -> Response:
        body = await self._body(request, CHALLENGE_BYTES)
        try:
            asked = Challenge.model_validate_json(body)
        except (ValidationError, ValueError) as error:
            raise Refused("not a challenge", "bitassay challenge RECEIPT --out FILE") from error

        def work() -> Iterator[bytes]:
            yield encode_opening(open_trace(self.served.store.trace(asked.commitment), asked))

        job = self.scheduler.submit(work())
        try:
            data = await self._next(job.results(), request)
        except LookupError:
            raise HTTPException(404, "the trace of this commitment is not kept, or not any more") from None
        self.counts["openings_total"] += 1
        return Response(data, media_type="application/octet-stream")

    async def metrics(self, request: Request) -> Response:
        store, scheduler = self.served.store, self.scheduler
        names = ("answers_total", "openings_total", "prompt_tokens_total", "generated_tokens_total")
        values = {
            **dict.fromkeys((*names, "failed_streams_total"), 0),
            **self.counts,
            "requests_active": len(scheduler.active),
            "requests_waiting": len(scheduler.queue),
            "traces": store.n_traces,
            "disk_bytes": store.used_bytes,
        }
        lines = [f"bitassay_{name} {value}" for name, value in values.items()]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _body(self, request: Request, limit: int) -> bytes:
        """The body of a request, at most `limit` bytes, which must come within BODY_SECONDS."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise HTTPException(413, f"the body has more than {limit} bytes")
        except TimeoutError:
            raise HTTPException(408, "the body did not come in time") from None
        return bytes(body)

    def authorised(self, scope: Any) -> bool:
        """Return whether a request may be answered: it has the key, or none is needed."""
        if self._api_key is None or scope["path"] == "/health":
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + self._api_key)


def make_app(served: Served, limits: Limits = Limits(), api_key: str | None = None) -> Any:
    """Return the ASGI application; `app.server.scheduler.stop()` ends its thread."""
    server = Server(served, limits, api_key)
    routes = [
        Route("/v1/models", server.models),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/receipts/{name}", server.receipt),
        Route("/v1/openings", server.opening, methods=["POST"]),
        Route("/metrics", server.metrics),
        Route("/health", server.health),
    ]
    handlers = dict.fromkeys((HTTPException, BitassayError, ClientDisconnect, Exception), _handled)
    inner = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]

    class App:
        """The application behind the check of the key."""

        def __init__(self) -> None:
            self.server = server

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            is_http = scope["type"] == "http"
            if is_http and not server.authorised(scope):
                refusal = JSONResponse(error_body(401, "a wrong API key, or none"), 401)
                await refusal(scope, receive, send)
                return
            try:
                await inner(scope, receive, send)
            except Exception:  # Starlette has answered with 500, and raises for the server to log
                if not is_http:
                    raise

    return App()


def explained(error: Exception) -> tuple[int, str]:
    """Return the status and message of an error; nothing about what is the server's own fault."""
    match error:
        case HTTPException():
            return error.status_code, str(error.detail)
        case Busy():
            return 429, str(error)
        case Full():
            return 507, "the server has no room for receipts"
        case BitassayError():
            return 400, str(error)
        case ClientDisconnect():
            return NOT_RECEIVED, "the client has gone"
        case MemoryError():
            return 503, "out of memory: a shorter prompt may be answered"
    return 500, f"an error of the server ({type(error).__name__})"


def report(error: Exception, status: int) -> None:
    """Log where an error of the server's own was raised, for whoever runs it. Its message is left out, which
    could hold what a client sent."""
    if status == 500:
        where = traceback.extract_tb(error.__traceback__)[-1]
        LOG.error("%s at %s:%s", type(error).__name__, where.filename, where.lineno)


async def _handled(request: Request, error: Exception) -> Response:
    status, message = explained(error)
    report(error, status)
    headers = {"retry-after": "1"} if status == 429 else None
    return JSONResponse(error_body(status, message), status, headers=headers)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"

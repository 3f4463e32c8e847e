"""Answers of `bitassay serve` as JSON, spelled as OpenAI's API spells them, and vLLM's for what it adds."""

import time
from collections.abc import Sequence
from typing import Any

from bitassay.audit.answering import Done, Entry, Piece, Read, Served
from bitassay.audit.requests import Chat, Completion
from bitassay.models.identity import tokenizer
from bitassay.verification.receipts.receipt import encode

Json = dict[str, Any]


class Spelled:
    """How one answer is written: whole (`whole`), or in events (`first`, `event`, `last`)."""

    def __init__(self, served: Served, asked: Completion | Chat, read: Read, ident: str) -> None:
        self.served, self.asked, self.read = served, asked, read
        self.is_chat, self.tokens = isinstance(asked, Chat), tokenizer(served.model)
        kind = "chat.completion" if self.is_chat else "text_completion"
        self.head = {"id": ident, "created": int(time.time()), "model": served.name}
        self.kind, self.echo = kind, isinstance(asked, Completion) and bool(asked.echo)
        self._offset = 0

    def whole(self, pieces: Sequence[Piece], done: Done) -> Json:
        """Return the answer as one object."""
        text = "".join(piece.text for piece in pieces)
        choice: Json = {"index": 0, "finish_reason": done.finish, "logprobs": self._logprobs(pieces, True)}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = (self._prompt_text() if self.echo else "") + text
        choice |= self._ids(pieces, True) | ({} if self.is_chat else self._prompt_logprobs())
        return {
            **self.head,
            "object": self.kind,
            "choices": [choice],
            "usage": self._usage(done),
            **(self._prompt_logprobs() if self.is_chat else {}),
            "receipt": self._receipt(done),
        }

    def first(self) -> list[Json]:
        """Return what goes before the first token."""
        if self.is_chat:
            return [self._chunk(delta={"role": "assistant", "content": ""}) | self._prompt_logprobs()]
        if not (self.echo or self._prompt_logprobs() or self.asked.return_token_ids):
            return []
        text = self._prompt_text() if self.echo else ""
        more = {"logprobs": self._logprobs([], True), **self._ids([], True), **self._prompt_logprobs()}
        return [self._chunk(text=text, **more)]

    def event(self, piece: Piece) -> Json:
        """Return the event of one token."""
        said = {"delta": {"content": piece.text}} if self.is_chat else {"text": piece.text}
        return self._chunk(**said, logprobs=self._logprobs([piece], False), **self._ids([piece], False))

    def last(self, done: Done) -> list[Json]:
        """Return the end: why it ended and the receipt, then the usage where it was asked for."""
        said: Json = {"delta": {}} if self.is_chat else {"text": ""}
        end = self._chunk(**said, finish_reason=done.finish) | {"receipt": self._receipt(done)}
        options = self.asked.stream_options
        if options is None or not options.include_usage:
            return [end]
        return [end, {**self.head, "object": self._chunk_kind, "choices": [], "usage": self._usage(done)}]

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _chunk(self, **choice: Any) -> Json:
        filled = {"index": 0, "finish_reason": None, "logprobs": None} | choice
        return {**self.head, "object": self._chunk_kind, "choices": [filled]}

    def _usage(self, done: Done) -> Json:
        prompt = len(self.read.ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": done.generated,
            "total_tokens": prompt + done.generated,
        }

    def _receipt(self, done: Done) -> Json:
        name = done.receipt.commitment.hex()
        return {
            "id": name,
            "url": f"/v1/receipts/{name}",
            "signer": done.receipt.key.hex(),
            "content": encode(done.receipt).decode(),
        }

    def _prompt_text(self) -> str:
        asked = self.asked
        if isinstance(asked, Completion) and isinstance(asked.one_prompt, str):
            return asked.one_prompt
        return str(self.tokens.decode([*self.read.ids], skip_special_tokens=True))

    def _ids(self, pieces: Sequence[Piece], with_prompt: bool) -> Json:
        if not self.asked.return_token_ids:
            return {}
        prompt = {"prompt_token_ids": list(self.read.ids)} if with_prompt else {}
        return {"token_ids": [piece.token for piece in pieces], **prompt}

    def _prompt_logprobs(self) -> Json:
        if self.asked.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": [None, *(self._ranked(entry) for entry in self.read.entries)]}

    def _ranked(self, entry: Entry) -> Json:
        ranks = {token: (value, rank) for rank, (token, value) in enumerate(entry.top, 1)}
        ranks |= {entry.token: (entry.logprob, entry.rank)}
        return {
            str(token): {"logprob": value, "rank": rank, "decoded_token": self._decoded(token)}
            for token, (value, rank) in ranks.items()
        }

    def _logprobs(self, pieces: Sequence[Piece], with_prompt: bool) -> Json | None:
        if self.asked.alternatives is None:
            return None
        entries = [piece.entry for piece in pieces if piece.entry is not None]
        if self.is_chat:
            content = [
                self._with_bytes(entry.token, entry.logprob)
                | {"top_logprobs": [self._with_bytes(token, value) for token, value in entry.top]}
                for entry in entries
            ]
            return {"content": content, "refusal": None}
        listed: list[Entry | int] = [*entries]
        if with_prompt and self.echo:
            listed = [self.read.ids[0], *self.read.entries, *entries]
        names = [self._named(each if isinstance(each, int) else each.token) for each in listed]
        offsets = []
        for each in listed:
            offsets.append(self._offset)
            self._offset += len(self._decoded(each if isinstance(each, int) else each.token))
        return {
            "tokens": names,
            "token_logprobs": [None if isinstance(each, int) else each.logprob for each in listed],
            "top_logprobs": [
                None
                if isinstance(each, int)
                else {self._named(token): value for token, value in reversed([*each.top])}
                for each in listed
            ],
            "text_offset": offsets,
        }

    def _with_bytes(self, token: int, logprob: float) -> Json:
        text = self._decoded(token)
        return {"token": self._named(token), "logprob": logprob, "bytes": list(text.encode())}

    def _named(self, token: int) -> str:
        return f"token_id:{token}" if self.asked.return_tokens_as_token_ids else self._decoded(token)

    def _decoded(self, token: int) -> str:
        return str(self.tokens.decode([token]))


def error_body(status: int, message: str) -> Json:
    """Return an error as OpenAI's API spells it."""
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def models_body(served: Served, created: int) -> Json:
    """Return the list of the one model that is served, and what may be asked of it."""
    model = {
        "id": served.name,
        "object": "model",
        "created": created,
        "owned_by": "bitassay",
        "max_model_len": served.max_context,
        "max_logprobs": served.max_logprobs,
        "signer": served.store.key.public_key().public_bytes_raw().hex(),
    }
    return {"object": "list", "data": [model]}

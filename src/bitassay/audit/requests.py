"""What a client may ask of `bitassay serve`: bodies of completions and chats, and their answers' events.

A field that would change the answer and is not supported is refused, never ignored. Fields that others than
OpenAI have added are spelled as vLLM spells them: `prompt_logprobs`, `return_token_ids`,
`return_tokens_as_token_ids`, `add_special_tokens`. Ours is `nonce`, the word of a verifier that the receipt
names and that keys the noise of sampling.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bitassay.engines.sampling import Sampler
from bitassay.errors import BitassayError
from bitassay.record.schema import defects
from bitassay.verification.trace import NONCE

ONE = Field(min_length=1, max_length=1)
MOST_STOPS, STOP_LETTERS = 4, 256
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


class Refused(BitassayError):
    """A request that cannot be answered as it is asked."""


class Stream(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(BaseModel):
    """What both kinds of requests have. `user` and `metadata` change nothing; fields with one allowed value
    may be sent as clients send their defaults."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(max_length=512)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    nonce: Annotated[str, Field(max_length=128, pattern=NONCE)] = "0"
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: Stream | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None
    user: Annotated[str, Field(max_length=4096)] | None = None
    metadata: dict[str, str] | None = None
    n: Literal[1] | None = 1
    presence_penalty: Literal[0] | None = 0
    frequency_penalty: Literal[0] | None = 0

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > MOST_STOPS or not all(0 < len(text) <= STOP_LETTERS for text in texts):
            raise ValueError(f"at most {MOST_STOPS} texts of 1 to {STOP_LETTERS} characters")
        return stop

    @property
    def stops(self) -> list[str]:
        """Return the texts at which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def sampler(self, drawn_seed: int) -> Sampler:
        """Return how tokens are to be chosen; with `drawn_seed` where the client names none."""
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        if not temperature:
            return Sampler()
        return Sampler(temperature, top_p, drawn_seed if self.seed is None else self.seed)


class Completion(Asked):
    """The body of /v1/completions. prompt: text or token ids, one; a list may hold it."""

    prompt: Text | Ids | Annotated[list[Text], ONE] | Annotated[list[Ids], ONE]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = False
    add_special_tokens: bool | None = True
    best_of: Literal[1] | None = 1

    @property
    def one_prompt(self) -> str | list[int]:
        """Return the prompt, out of its list."""
        first = self.prompt[0]
        return first if isinstance(first, (str, list)) and not isinstance(self.prompt, str) else self.prompt  # type: ignore[return-value]

    @property
    def new_tokens(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Return how many most likely tokens are asked for at each position; None: no log-probabilities."""
        return self.logprobs


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def as_given(self) -> dict[str, str]:
        """Return what a chat template reads."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text}


class Chat(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None

    @property
    def new_tokens(self) -> int | None:
        """Return how many tokens are asked for; None: as many as fit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Return how many most likely tokens are asked for at each position; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


def parse(kind: type[Completion] | type[Chat], body: bytes) -> Completion | Chat:
    """Return the request in a body that may come from anyone. Raises Refused."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error!s:.200}") from error
    if not isinstance(value, dict):
        raise Refused("the body is not a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise Refused(defects(error, kind)[:1000]) from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number of JSON")

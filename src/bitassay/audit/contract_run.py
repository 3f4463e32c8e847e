"""Ask an endpoint what `contract.py` checks, and say what follows. Every answer's outcomes are kept at once;
the same command goes on.

    parts/request-S-NNNNN.json   outcomes of one text at server S (0: the checked one; 1: the honest one)
    parts/long-S-NNNNN.json      of one long prompt
    parts/tool-S-NNNNN.json      of one question with tools
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bitassay.audit.asking import Asking, Text, body_of, prompt_of, texts
from bitassay.audit.client import AnswerError, Target
from bitassay.audit.contract import (
    Outcome,
    Said,
    check_answer,
    check_call,
    check_long,
    check_same,
    check_stop,
    decide_contract,
    rates,
    said_in,
    stop_in,
    streamed_text,
    tool_bodies,
)
from bitassay.audit.probe import probe
from bitassay.audit.session import NOT_THEIR_FAULT, PROBE_TOKENS, PROMPT_TOKENS, keep_all
from bitassay.audit.wire import Vocabulary
from bitassay.data.corpora import pinned
from bitassay.errors import BitassayError
from bitassay.record.environment import environment
from bitassay.record.progress import Progress, silent
from bitassay.record.result import write_run
from bitassay.record.run import RunFolder, open_run_folder, run_plan

NEW_TOKENS = 24
LONG = 0.9  # of the context
LONG_REQUESTS = 3
LONG_NEW = 4
BEGINNING = 8  # tokens of another beginning
ABSENT = ("status-400", "status-404", "status-405", "status-422", "status-501", "status-500")


@dataclass(frozen=True)
class Terms:
    """What is asked. context: tokens that the server advertises (None: what /models says); requests: texts,
    and questions with tools."""

    corpus: str = "c4-train-new"
    requests: int = 16
    context: int | None = None
    alpha: float = 0.01
    seed: int = 0
    concurrency: int = 4
    out: Path | None = None


def contract(
    target: Target,
    vocabulary: Vocabulary,
    name: str,
    terms: Terms,
    *,
    honest: Target | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Path]:
    """Return the run of the checks and its folder. name: of the model whose tokenizer counts. Raises
    BitassayError where a server cannot be asked."""
    servers = [target, *([honest] if honest else [])]
    work = {
        **{key: value for key, value in asdict(terms).items() if key not in ("out", "concurrency")},
        "corpus": pinned(terms.corpus),
        "tokenizer": name,
        "servers": [[each.endpoint.url, each.model] for each in servers],
    }
    folder = open_run_folder("contract", run_plan("contract", work), terms.out)
    outcomes: list[list[Outcome]] = []
    problems: list[dict[str, Any]] = []
    for index, server in enumerate(servers):
        asker = _Asker(index, server, vocabulary, terms, folder, progress)
        by_request = asker.all()
        outcomes.append([each for some in by_request for each in some])
        problems += [
            {"server": server.endpoint.url, "check": check, "request": number, "problem": problem}
            for number, some in enumerate(by_request, 1)
            for check, kept, problem in some
            if not kept
        ]
    rows = rates(outcomes[0], outcomes[1] if honest else None)
    run = write_run(
        folder,
        model={"name": name, "origin": target.endpoint.url, "asked_for": target.model},
        settings=work,
        environment=environment(),
        rows=rows,
        problems=problems,
        decision=decide_contract(rows, terms.alpha),
    )
    return run, folder.path


class _Asker:
    """Asks one server everything."""

    def __init__(
        self,
        index: int,
        target: Target,
        vocabulary: Vocabulary,
        terms: Terms,
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        self.index, self.target, self.vocabulary = index, target, vocabulary
        self.terms, self.folder, self.progress = terms, folder, progress
        self.tokenizer = vocabulary.tokenizer
        self.asking = Asking(**folder.part(f"probe-{index}", self._probed))

    def _probed(self) -> dict[str, Any]:
        (text,) = self._texts(0, 1, PROBE_TOKENS)
        found = probe(self.target, self.vocabulary, text, NEW_TOKENS, PROMPT_TOKENS, 5)
        levels = [each for level, each in found.askings.items() if not level.startswith("prompt-")]
        if not levels:
            raise BitassayError(
                f"{self.target.endpoint.url}: names no tokens, so nothing can be counted", "another server"
            )
        return asdict(replace(levels[0], k=min(levels[0].k, 5)))

    def _texts(self, number: int, count: int, tokens: int) -> list[Text]:
        return texts(self.tokenizer, self.terms.corpus, (self.terms.seed, number), count, tokens)

    def all(self) -> list[list[Outcome]]:
        """Return the outcomes of every request."""
        work: dict[str, Callable[[], list[Outcome]]] = {}
        for number, text in enumerate(self._texts(1, self.terms.requests, PROMPT_TOKENS)):
            work[f"request-{self.index}-{number:05d}"] = partial(self._request, text)
        context = self.folder.part(f"context-{self.index}", self._context)
        if context:
            length = int(LONG * context) - LONG_NEW
            for number, text in enumerate(self._texts(2, LONG_REQUESTS, length)):
                work[f"long-{self.index}-{number:05d}"] = partial(self._long, text)
        for number, (is_needed, body) in enumerate(tool_bodies(self.terms.requests)):
            work[f"tool-{self.index}-{number:05d}"] = partial(self._tool, is_needed, body)
        what = f"checking {self.target.endpoint.url}"
        keep_all(self.folder, work, self.terms.concurrency, what, self.progress)
        return [[tuple(each) for each in self.folder.part(name, work[name])] for name in work]

    def _context(self) -> int:
        """The tokens that the server says it serves; 0: it does not say."""
        if self.terms.context is not None:
            return self.terms.context
        try:
            listed = self.target.endpoint.get("/models")
        except AnswerError as error:
            if error.code in NOT_THEIR_FAULT and error.code not in ABSENT:
                raise
            return 0
        try:
            models = [each for each in listed["data"] if each.get("id") == self.target.model]
            (known, *_) = models or listed["data"]
            known = known | {"n_ctx": (known.get("meta") or {}).get("n_ctx")}  # as llama.cpp's server says it
        except (TypeError, LookupError, ValueError, AttributeError):  # another shape than known ones
            return 0
        said = [known.get(key) for key in ("max_model_len", "n_ctx", "context_length", "context_window")]
        return next((n for n in said if isinstance(n, int) and 64 <= n <= 2**24), 0)

    def _request(self, text: Text) -> list[Outcome]:
        asking = replace(self.asking, new_tokens=NEW_TOKENS)
        path, body = body_of(asking, self.target.model, text)
        prompt = prompt_of(text, asking.form, self.tokenizer)

        def checks() -> list[Outcome]:
            said = self._said(path, body, prompt)
            found = check_answer(said, len(prompt), NEW_TOKENS)
            again = self._said(path, body, prompt)
            found.append(check_same("greedy answers repeat", said.text, again.text))
            streamed, _ = streamed_text(self.target.endpoint.events(path, body | {"stream": True}))
            found.append(check_same("streams say the same", said.text, streamed))
            if stop := stop_in(said.text):
                found.append(check_stop(self._said(path, body | {"stop": [stop]}, prompt), stop))
            return found

        return _named("usage counts the prompt", checks)

    def _long(self, text: Text) -> list[Outcome]:
        asking = replace(self.asking, new_tokens=LONG_NEW)
        turned = (*reversed(text.ids[:BEGINNING]), *text.ids[BEGINNING:])
        other = Text(str(self.tokenizer.decode(list(turned), skip_special_tokens=True)), turned)

        def checks() -> list[Outcome]:
            said = []
            for each in (text, other, text):
                path, body = body_of(asking, self.target.model, each)
                said.append(self._said(path, body, prompt_of(each, asking.form, self.tokenizer)))
            one, turned_round, again = said
            return check_long(one, turned_round, again, len(prompt_of(text, asking.form, self.tokenizer)))

        return _named("long prompts are taken", checks)

    def _tool(self, is_needed: bool, body: dict[str, Any]) -> list[Outcome]:
        """Nothing where the server takes no tools."""
        body = {"model": self.target.model, "temperature": 0, "max_tokens": 256} | body
        try:
            value = self.target.endpoint.post("/chat/completions", body)
            return check_call(said_in(value, self.vocabulary, ()), is_needed)
        except AnswerError as error:
            if error.code in ABSENT:
                return []
            if error.code in NOT_THEIR_FAULT:
                raise
            return [("arguments fit the schema", False, error.problem[:200])]

    def _said(self, path: str, body: dict[str, Any], prompt: Sequence[int]) -> Said:
        return said_in(self.target.endpoint.post(path, body), self.vocabulary, prompt)


def _named(check: str, checks: Callable[[], list[Outcome]]) -> list[Outcome]:
    """The outcomes; an answer that is none counts against `check`."""
    try:
        return checks()
    except AnswerError as error:
        if error.code in NOT_THEIR_FAULT and error.code != "status-500":
            raise
        return [(check, False, error.problem[:200])]

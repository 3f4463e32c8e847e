"""One audit under way: what was asked, answered and measured, each kept as a part of the run folder at once.

    parts/texts-NAME.json        what is asked (NAME: probe, honest or audited)
    parts/probe-S.json           what server S gives (0: the audited one; 1, 2, ...: honest ones)
    parts/answer-S-NNNNN.json    one answer, or what was wrong with it
    parts/score-S-NNNNN.json     its distances from the reference

What the server cannot be blamed for (it cannot be reached, it is busy) ends the command; what it can be
blamed for is an answer that cannot be judged.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bitassay.audit.asking import Asking, Text, body_of, prompt_of, texts
from bitassay.audit.client import AnswerError, Target
from bitassay.audit.distance import Level
from bitassay.audit.judge import AuditProfile, Reference, answer_p_value, measure
from bitassay.audit.probe import FATAL, probe
from bitassay.audit.wire import Answered, Position, Vocabulary, read_answer
from bitassay.engines.decode import vocabulary_size
from bitassay.errors import BitassayError
from bitassay.models.identity import tokenizer
from bitassay.record.files import read_json
from bitassay.record.progress import Progress
from bitassay.record.run import RunFolder
from bitassay.verification.container import TraceError
from bitassay.verification.receipts.receipt import check_signature, decode

PROBE_TOKENS = 12
PROMPT_TOKENS = 32
BEHIND = 8  # tokens of a prompt with which the text behind it is split
NOT_THEIR_FAULT = FATAL | {"status-500"}


@dataclass(frozen=True)
class Options:
    """What an audit does. tokens: positions a request; requests, calibration_requests: how many; k: most
    likely tokens at each position, at most; level: of evidence (None: the
    strongest); chat: ask by messages, whose template and system prompt are the server's; seed: of the
    texts (None: drawn); watched: one of many audits, which the ledger alone decides.
    """

    corpus: str = "c4-train-new"
    tokens: int = 128
    requests: int = 16
    calibration_requests: int = 128
    k: int = 20
    level: Level | None = None
    alpha: float = 0.01
    seed: int | None = None
    concurrency: int = 4
    watched: bool = False
    chat: bool = False
    ledger: Path | None = None
    out: Path | None = None


_MEASURED = ("positions", "distance", "control", "score")


class Session:
    """Ask, measure, and keep both. The same calls return what is kept."""

    def __init__(self, reference: Reference, options: Options, folder: RunFolder, progress: Progress) -> None:
        self.reference, self.options, self.folder, self.progress = reference, options, folder, progress
        self.tokenizer = tokenizer(reference.exact)
        self.vocabulary = Vocabulary(self.tokenizer, vocabulary_size(reference.exact))
        self.probes: dict[int, Any] = {}

    def texts(self, name: str, count: int, tokens: int) -> list[Text]:
        """Return the texts of one purpose, drawn once."""
        number = ("probe", "honest", "audited").index(name)
        seed = (self.folder.plan["seed"], number)
        kept = self.folder.part(
            f"texts-{name}",
            lambda: [
                asdict(each)
                for each in texts(self.tokenizer, self.folder.plan["corpus"], seed, count, tokens)
            ],
        )
        return [Text(each["text"], tuple(each["ids"])) for each in kept]

    def probed(
        self, index: int, target: Target, profile: AuditProfile | None, like: Asking | None = None
    ) -> Asking:
        """Find out once how to ask a server; ask as a profile says, or as another server is asked."""
        options = self.options

        def find() -> dict[str, Any]:
            self.progress(f"asking {target.endpoint.url} which evidence it gives")
            (text,) = self.texts("probe", 1, PROBE_TOKENS)
            sizes = options.tokens, PROMPT_TOKENS, options.k
            found = probe(target, self.vocabulary, text, *sizes, options.chat)
            level = profile.level if profile else like.level if like else options.level
            return {"asking": asdict(found.choose(level, target.endpoint.url)), "rows": found.rows}

        self.probes[index] = kept = self.folder.part(f"probe-{index}", find)
        asking = Asking(**kept["asking"])
        wanted = profile or like
        if wanted is None:
            return asking
        if asking.k < wanted.k or asking.form != wanted.form:
            raise BitassayError(
                f"{target.endpoint.url}: gives top {asking.k} for {asking.form}, "
                f"and it is compared with top {wanted.k} for {wanted.form}",
                f"--top {min(asking.k, wanted.k)}",
            )
        if asking.positions != wanted.positions:
            raise BitassayError(
                f"the profile is of {wanted.positions} positions a request, not {asking.positions}",
                "--tokens as in calibration",
            )
        return Asking(**(kept["asking"] | {"k": wanted.k}))

    def scores(self, index: int, target: Target, asking: Asking, count: int) -> list[float | None]:
        """Return the statistic of each answer; None where there is none."""
        name = "honest" if index else "audited"
        asked = self.texts(name, count, asking.prompt_tokens)
        named = {f"answer-{index}-{number:05d}": text for number, text in enumerate(asked)}
        ask_all(self.folder, target, asking, named, self.vocabulary, self.options.concurrency, self.progress)
        scores = []
        for number in range(count):
            self.progress(f"judging {target.endpoint.url}", number, count)
            score = partial(self._score, index, number, asking)
            part = self.folder.part(f"score-{index}-{number:05d}", score)
            scores.append(part.get("score"))
        self.progress(f"judging {target.endpoint.url}", count, count)
        return scores

    def _score(self, index: int, number: int, asking: Asking) -> dict[str, Any]:
        answer = self.answer(index, number)
        if "error" in answer:
            return {"error": answer["error"]}
        positions = positions_of(answer, asking)
        if not positions:
            return {"error": "no-evidence"}
        try:
            return asdict(measure(self.reference, asking, answer["prompt_ids"], positions))
        except AnswerError as error:
            return {"error": error.code}

    def answer(self, index: int, number: int) -> dict[str, Any]:
        """Read an answer that is kept."""
        return self.kept(f"answer-{index}-{number:05d}")

    def kept(self, name: str) -> Any:
        return read_json(self.folder.path / "parts" / f"{name}.json")

    def rows(self, asking: Asking, profile: AuditProfile | None) -> list[dict[str, Any]]:
        """Return a row for each answer of the audited server."""
        rows = []
        for number in range(self.options.requests):
            score = self.kept(f"score-0-{number:05d}")
            row = {"request": number + 1, **{key: score.get(key) for key in _MEASURED}, "p_value": None}
            if row["score"] is not None and profile is not None:
                row["p_value"] = answer_p_value(row["score"], profile)
            rows.append(row | {"problem": score.get("error", "")})
        return rows

    def probe_rows(self) -> list[dict[str, Any]]:
        """Return what each server gives, one row for each kind of evidence."""
        rows = self.probes[0]["rows"]
        return [
            {**row, "honest": [self.probes[i]["rows"][n]["given"] for i in self.probes if i]}
            for n, row in enumerate(rows)
        ]

    def receipts(self) -> dict[str, Any]:
        """Count the answers with a receipt that is signed and of this answer, and name the signers."""
        found = [self.answer(0, number).get("receipt") for number in range(self.options.requests)]
        given = [each for each in found if each]
        return {
            "given": len(given),
            "valid": sum(each["valid"] for each in given),
            "signers": sorted({each["signer"] for each in given if each["valid"]}),
        }


def ask_all(
    folder: RunFolder,
    target: Target,
    asking: Asking,
    asked: Mapping[str, Text],
    vocabulary: Vocabulary,
    concurrency: int,
    progress: Progress,
) -> None:
    """Keep the answer to each text, or what was wrong with it, as the part of its name; what is kept is not
    asked again. Raises AnswerError for what the server cannot be blamed for."""
    work = {name: partial(ask_once, target, asking, text, vocabulary) for name, text in asked.items()}
    keep_all(folder, work, concurrency, f"asking {target.endpoint.url}", progress)


def keep_all(
    folder: RunFolder, work: Mapping[str, Callable[[], Any]], concurrency: int, what: str, progress: Progress
) -> None:
    """Keep what each of `work` gives as the part of its name, several at a time; what is kept is not done
    again. The first error ends what has not begun, and is raised. what: progress says."""
    missing = [name for name in work if not folder.has(name)]
    stop = threading.Event()

    def keep(name: str) -> None:
        if not stop.is_set():
            folder.part(name, work[name])

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            for done, _ in enumerate(pool.map(keep, missing)):
                progress(what, done, len(missing))
        except BaseException:
            stop.set()
            raise
    if missing:
        progress(what, len(missing), len(missing))


def ask_once(target: Target, asking: Asking, text: Text, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the answer to a text as it is kept, or what was wrong with it. Raises AnswerError for what the
    server cannot be blamed for."""
    path, body = body_of(asking, target.model, text)
    prompt = prompt_of(text, asking.form, vocabulary.tokenizer)
    kept: dict[str, Any] = {"prompt_ids": list(prompt)}
    try:
        answered = read_answer(target.endpoint.post(path, body), vocabulary, prompt, asking.through == "echo")
        known = kept | asdict(answered) | {"receipt": checked_receipt(answered, prompt)}
        if asking.level == "text":
            read = retokenized(vocabulary.tokenizer, prompt, answered.text)
            known["output"] = [asdict(each) for each in read[: asking.new_tokens]]
        return known
    except AnswerError as error:
        if error.code in NOT_THEIR_FAULT:
            raise
        return kept | {"error": error.code, "problem": error.problem[:500]}


def positions_of(answer: dict[str, Any], asking: Asking) -> list[Position]:
    """Return the positions of a kept answer that are judged; none where it has no evidence."""
    said = answer.get("output" if asking.through == "generation" else "prompt") or []
    return [Position(each["token"], each["logprob"], tuple(map(tuple, each["top"]))) for each in said]


def retokenized(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], text: str) -> tuple[Position, ...]:
    """Return the tokens of an answer that is known as text alone, as the tokenizer splits it: behind the end
    of the prompt where that keeps the prompt's tokens, else by itself. A model may have split it otherwise;
    honest servers' answers have that too."""
    for length in range(min(BEHIND, len(prompt)), -1, -1):
        before = list(prompt[len(prompt) - length :])
        whole = tokenizer(str(tokenizer.decode(before)) + text, add_special_tokens=False, verbose=False)
        if list(whole.input_ids[:length]) == before:
            return tuple(Position(token) for token in whole.input_ids[length:])
    raise AssertionError("nothing is what everything begins with")


def checked_receipt(answered: Answered, prompt: Sequence[int]) -> dict[str, Any] | None:
    """Return an answer's receipt, and whether it is signed and of this prompt and these tokens; None without
    one."""
    if not answered.receipt:
        return None
    try:
        receipt = decode(answered.receipt.encode(), Path("receipt"))
        check_signature(receipt)
    except (TraceError, UnicodeEncodeError) as error:
        why = getattr(error, "code", "malformed")
        return {"valid": False, "signer": "", "why": why, "content": answered.receipt}
    output = tuple(each.token for each in answered.output or ())
    is_ours = (
        receipt.header.prompt_ids == tuple(prompt) and receipt.header.output_ids[: len(output)] == output
    )
    why = "" if is_ours else "of-another-answer"
    return {"valid": is_ours, "signer": receipt.key.hex(), "why": why, "content": answered.receipt}

"""The models of this package as models of lm-eval, by the name `bitassay`.

Importing this module registers the name, since lm-eval finds no plug-ins. In Python, that is enough for
`lm_eval.simple_evaluate(model="bitassay", ...)`. For lm-eval's command line, run this module instead:

    python -m bitassay.evaluation.harness run --model bitassay --model_args pretrained=smollm2-135m \\
        --tasks hellaswag

Text becomes tokens by lm-eval's own rules (`TemplateLM._encode_pair`, `HFLM.tok_encode`): spaces at the end
of a context belong to the continuation, the pair is tokenized in one piece and cut where the context's own
tokens end, and no second BOS is added. The model's work is in `likelihood.py` and `greedy.py`,
that of other engines in `hosted.py`.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.api.registry import model_registry, register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel

from bitassay.engines.engine import TRANSFORMERS, engine_name
from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.evaluation.greedy import greedy_texts
from bitassay.evaluation.hosted import hosted_scores, hosted_texts, longest_text
from bitassay.evaluation.likelihood import continuation_scores
from bitassay.models.config import text_config
from bitassay.models.identity import tokenizer as tokenizer_of
from bitassay.quantization.pipeline import quantize_cached
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder

DEFAULT_NEW_TOKENS = 256  # as lm-eval's hf model
PART_REQUESTS = 512
# What a task may say about generation without asking for anything but greedy decoding.
GREEDY_OPTIONS = {"do_sample", "temperature", "top_p", "top_k"}


class BitassayLM(TemplateLM):
    """A model for lm-eval.

    pretrained: whatever `bitassay.load` takes, or a loaded model; recipe: quantize it by this one first;
    packed: keep its codes packed. engine: who runs it. device: as torch names it; lm-eval's command line asks
    for cuda:0 by default, which without CUDA is taken as the CPU. max_length: read at most so many tokens
    (default: the model's positions). batch_tokens: tokens in one forward (default: by device). lm-eval's
    batch_size and max_batch_size have no effect.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        recipe: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        packed: bool = False,
        engine: str = TRANSFORMERS,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool = False,
        progress: Progress = silent,
    ):
        super().__init__()
        model = pretrained
        if not isinstance(model, PreTrainedModel):
            no_cuda = device is None or (device.startswith("cuda") and not torch.cuda.is_available())
            model = load(
                model,
                dtype=dtype,
                device="cpu" if no_cuda else str(device),
                packed=packed and recipe is None,
                engine=engine,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        if recipe is not None:
            model = quantize_cached(model, recipe, packed=packed, progress=progress)
        if batch_tokens is not None and batch_tokens < 1:
            raise BitassayError(f"batch_tokens={batch_tokens}", "leave it out, or give 1 or more")
        self.model, self.tokenizer = model, tokenizer_of(model)
        self.batch_tokens, self.progress = batch_tokens, progress
        limit = longest_text(model)
        if max_length is None:
            resolved = resolve_max_length(text_config(model), self.tokenizer)
            max_length = resolved if limit is None or resolved < 1 else min(resolved, limit)
        if max_length < 1 or (limit is not None and max_length > limit):
            raise BitassayError(f"max_length={max_length}", f"leave it out, or give 1 to {limit or 'more'}")
        self.max_length = max_length
        self.max_gen_toks = DEFAULT_NEW_TOKENS
        self.hosted = engine_name(model) != TRANSFORMERS
        self._device = torch.device("cpu") if self.hosted else model.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id  # type: ignore[return-value]

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos  # type: ignore[return-value]

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        prefix = str(self.tokenizer.decode(self.prefix_token_id))
        return self._encode(string, prefix, add_special_tokens)

    def _encode(self, text: str, bos: Any, add_special_tokens: bool | None = None) -> list[int]:
        if add_special_tokens is None and isinstance(bos, str) and text.startswith(bos):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(text, **options)  # type: ignore[arg-type]

    def _loglikelihood_tokens(  # type: ignore[override]
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_options: Any,
    ) -> list[tuple[float, bool]]:
        for texts, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                text = repr(texts)
                text = text if len(text) < 200 else f"{text[:100]} ... {text[-100:]}"
                raise BitassayError(
                    f"a continuation of {len(continuation)} tokens cannot be scored by a model that reads "
                    f"{self.max_length}: {text}",
                    "leave the item out, or choose another model",
                )
        pairs = [(context, continuation) for _, context, continuation in requests]
        done = self._reporter("scoring continuations", len(requests), disable_tqdm)
        if self.hosted:
            scores = hosted_scores(self.model, pairs, max_length=self.max_length, done=done)
        else:
            scores = continuation_scores(
                self.model, pairs, max_length=self.max_length, batch_tokens=self.batch_tokens, done=done
            )
        answers = [(score.log_likelihood, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text in nats; every token is predicted once, from as many tokens
        before it as the model reads."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])  # type: ignore[arg-type]
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(None, *make_disjoint_window(window)) for window in cut]
            owners += [owner] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (log_likelihood, _) in zip(owners, scores, strict=True):
            sums[owner] += log_likelihood
        for request, answer in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return greedy texts up to a request's stop strings. Raises BitassayError where a task asks for
        anything but greedy decoding."""
        report = self._reporter("generating", len(requests), disable_tqdm)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)  # type: ignore[misc]
        answers: dict[int, str] = {}
        for group in groups.values():
            stops, new_tokens = self._until(requests[group[0]].args[1])  # type: ignore[misc]
            room = self.max_length - new_tokens
            if room < 1:
                raise BitassayError(
                    f"{new_tokens} new tokens leave no room for a prompt in the {self.max_length} that the "
                    "model reads",
                    "ask for fewer, or give another model",
                )
            before = len(answers)
            prompts = [str(requests[index].args[0]) for index in group]
            ids = [self._encode(prompt, self.tokenizer.bos_token)[-room:] for prompt in prompts]
            asked = {
                "stops": stops,
                "max_new_tokens": new_tokens,
                "done": lambda count, before=before: report(before + count),
            }
            if self.hosted:
                texts = hosted_texts(self.model, self.tokenizer, ids, **asked)
            else:
                asked["batch_tokens"] = self.batch_tokens
                texts = greedy_texts(self.model, self.tokenizer, ids, **asked)
            for index, text in zip(group, texts, strict=True):
                answers[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return [answers[index] for index in range(len(requests))]

    def _until(self, asked: dict[str, Any]) -> tuple[list[str], int]:
        """The stop strings and the number of new tokens that a task asks for."""
        options: dict[str, Any] = {**normalize_gen_kwargs(asked, self.max_gen_toks)}
        stops = handle_stop_sequences(
            options.pop("until"),
            eos=self.tokenizer.decode(self.eot_token_id),  # type: ignore[arg-type]
        )
        new_tokens = options.pop("max_gen_toks")
        refused = ["do_sample"] if options.get("do_sample") else sorted(options.keys() - GREEDY_OPTIONS)
        if refused:
            value = options[refused[0]]
            raise BitassayError(
                f"the task asks to generate with {refused[0]}={value!r}; this adapter decodes greedily",
                "lm_eval --model hf for such a task",
            )
        return stops, int(new_tokens)

    def _reporter(self, what: str, total: int, quiet: bool) -> Callable[[int], None]:
        return (lambda count: None) if quiet else (lambda count: self.progress(what, count, total))


class KeptAnswers(LM):
    """A model whose answers are kept in a run folder, in parts of PART_REQUESTS, and are not asked again. The
    requests of one `name` must be the same every time, which the folder's plan ensures. (lm-eval's own cache
    keeps pickles.)"""

    def __init__(self, lm: BitassayLM, folder: RunFolder, name: str):
        super().__init__()
        self.lm, self.folder, self.name = lm, folder, name

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        return [(value, greedy) for value, greedy in self._kept("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        return self._kept("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        return self._kept("generate_until", requests)

    def _kept(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        answers, answer = [], getattr(self.lm, kind)
        for start in range(0, len(requests), PART_REQUESTS):
            part = requests[start : start + PART_REQUESTS]
            answers += self.folder.part(
                f"{self.name}-{kind}-{start // PART_REQUESTS:05d}", lambda part=part: answer(part)
            )
        return answers


if "bitassay" not in model_registry:  # this file may be imported twice, once as __main__
    register_model("bitassay")(BitassayLM)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and messages of lm-eval and of its data sets."""
    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def main() -> None:
    """Run lm-eval's own command line, which then knows the model `bitassay`."""
    cli_evaluate()


if __name__ == "__main__":
    main()

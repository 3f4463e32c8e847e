"""What `bitassay audit` does instead of one audit: judge again, compare, check a contract."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bitassay.audit.judge import Reference
    from bitassay.audit.suspects import Suspect
    from bitassay.record.progress import Progress

ALPHA = 0.01


def replayed(
    recorded: Path,
    reference: str | None,
    recipe: str | None,
    suspects: list[str],
    profile: Path | None,
    alpha: float | None,
    ledger: Path | None,
    loading: options.Loading,
    device: str,
    output: options.RunOutput,
) -> int:
    """Judge a recorded audit again; return the exit status."""
    check_words([reference], [recipe, *recipes_of(suspects)], folder=output.out, file=ledger)
    from bitassay.audit.judge import read_audit_profile
    from bitassay.audit.replay import read_recorded, replay

    was = read_recorded(recorded)
    known = None if profile is None else read_audit_profile(profile)
    if reference is None:
        check_words([was.reference.name])
    loaded = Loader(reference or was.reference.name, recipe, loading, device)
    with show_progress() as progress:
        run, folder = replay(
            recorded,
            loaded.reference(progress),
            alpha=alpha,
            profile=known,
            ledger=ledger,
            suspects=loaded.suspects(suspects, progress),
            out=output.out,
            progress=progress,
        )
    return shown(run, folder, output)


def changed(
    url: str,
    model: str,
    reference: str | None,
    against: Path,
    repeats: int | None,
    alpha: float | None,
    seed: int | None,
    concurrency: int,
    timeout: int,
    key_env: str | None,
    ca_file: Path | None,
    loading: options.Loading,
    output: options.RunOutput,
) -> int:
    """Compare a server with a recorded audit; return the exit status."""
    from bitassay.audit.client import Endpoint, checked_url, require_variable

    checked_url(url)
    require_variable(key_env)
    check_words([reference], folder=output.out)
    from bitassay.audit.change import REPEATS, change
    from bitassay.audit.replay import read_recorded
    from bitassay.audit.session import Target
    from bitassay.audit.words import words_of

    name = reference or read_recorded(against).reference.name
    with show_progress() as progress:
        vocabulary, digest = words_of(name, progress, trust_remote_code=loading.trust_remote_code)
        run, folder = change(
            against,
            Target(Endpoint(url, key_env, ca_file=ca_file, seconds=timeout), model),
            vocabulary,
            digest,
            repeats=repeats or REPEATS,
            alpha=ALPHA if alpha is None else alpha,
            seed=seed or 0,
            concurrency=concurrency,
            out=output.out,
            progress=progress,
        )
    return shown(run, folder, output)


def kept_contract(
    servers: list[tuple[str, str, str | None]],
    reference: str,
    text: str,
    requests: int | None,
    context: int | None,
    alpha: float | None,
    seed: int | None,
    concurrency: int,
    timeout: int,
    ca_file: Path | None,
    loading: options.Loading,
    output: options.RunOutput,
) -> int:
    """Check what a server promises; servers: URL, model and key's variable of it and of an honest one. Return
    the exit status."""
    from bitassay.audit.client import Endpoint, checked_url, require_variable
    from bitassay.data.corpora import check_corpus

    if len(servers) > 2:
        raise BitassayError("--contract compares with one honest server", "one --calibrate-from")
    for each, _, variable in servers:
        checked_url(each)
        require_variable(variable)
    check_words([reference], folder=output.out)
    check_corpus(text)
    from bitassay.audit.contract_run import Terms, contract
    from bitassay.audit.session import Target
    from bitassay.audit.words import words_of

    target, *honest = [
        Target(Endpoint(url, key, ca_file=ca_file, seconds=timeout), model) for url, model, key in servers
    ]
    with show_progress() as progress:
        vocabulary, _ = words_of(reference, progress, trust_remote_code=loading.trust_remote_code)
        given = Terms()
        terms = Terms(
            text,
            requests or given.requests,
            context,
            alpha or ALPHA,
            seed or 0,
            concurrency,
            output.out,
        )
        run, folder = contract(
            target,
            vocabulary,
            reference,
            terms,
            honest=honest[0] if honest else None,
            progress=progress,
        )
    return shown(run, folder, output)


def shown(run: dict[str, Any], folder: Path, output: options.RunOutput) -> int:
    """Print a run and its decision; return the exit status."""
    output.show_run(run, folder)
    decision = run["decision"]
    print(f"{decision['status']}: {decision['why']}", file=sys.stderr)
    return 0 if decision["status"] == "PASS" else 1


def recipes_of(words: Iterable[str]) -> list[str]:
    """Return the suspects that are recipes."""
    from bitassay.audit.hosts import is_recipe

    return [word for word in words if is_recipe(word)]


@dataclass(frozen=True)
class Loader:
    """Loads the reference, and the models that may answer instead."""

    name: str
    recipe: str | None
    loading: options.Loading
    device: str

    def _load(self, dtype: options.Dtype, recipe: str | None, progress: "Progress") -> "PreTrainedModel":
        computing = options.Compute(**vars(self.loading), device=self.device, dtype=dtype)
        return computing.load(self.name, recipe, progress=progress)

    def reference(self, progress: "Progress") -> "Reference":
        """Return the reference in both precisions."""
        from bitassay.audit.judge import Reference

        exact = self._load("float32", self.recipe, progress)
        return Reference(exact, self._load("bfloat16", self.recipe, progress))

    def suspects(self, words: Iterable[str], progress: "Progress") -> "dict[str, Suspect]":
        """Return what may have been done instead, by word. Raises BitassayError for a word that says
        nothing."""
        from bitassay.audit.hosts import suspect

        def load(recipe: str | None) -> "PreTrainedModel":
            return self._load("bfloat16", recipe or self.recipe, progress)

        return {word: suspect(word, load) for word in words}

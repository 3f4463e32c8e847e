"""What `bitassay audit` does instead of one audit: judge again, compare, check a contract."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bitassay.audit.client import Target
    from bitassay.audit.judge import Reference
    from bitassay.audit.suspects import Suspect
    from bitassay.record.progress import Progress

ALPHA = 0.01


# Why some options have no effect in a mode, and which.
MODES = {
    "--replay": (
        "asks nothing",
        "a URL, --model, --calibrate-from, --seed, --evidence, --requests, --budget, --key-env, --watch, "
        "--against, --contract, --tokens, --top, --chat, --ca-file",
    ),
    "--against": (
        "asks what the recording asked",
        "--calibrate-from, --profile, --ledger, --evidence, --requests, --budget, --watch, --suspects, "
        "--recipe, --contract, --tokens, --top, --chat",
    ),
    "--contract": (
        "asks for no evidence",
        "--profile, --ledger, --evidence, --budget, --watch, --suspects, --recipe, --chat",
    ),
}
NEEDS = {"--times": "--watch", "--repeats": "--against", "--context": "--contract"}


def mode_of(options: Mapping[str, Any]) -> str:
    """Return which of MODES the options ask for, empty where none. options: values by name, None where not
    given. Raises BitassayError for an option that has no effect beside the others."""
    given = {name for name, value in options.items() if value is not None}
    mode = next((each for each in MODES if each in given), "")
    why, without = MODES.get(mode, ("", ""))
    if wrong := [name for name in without.split(", ") if name in given]:
        raise BitassayError(f"{mode} {why}, so {wrong[0]} says nothing", "leave it out")
    for name, needed in NEEDS.items():
        if name in given and needed not in given:
            raise BitassayError(f"{name} says nothing without {needed}", f"add {needed}, or leave it out")
    return mode


@options.group
class Connection:
    """How servers are reached."""

    concurrency: options.Count = 4
    """Requests at a time."""
    timeout: options.Count = 120
    """Seconds that an answer may take."""
    key_env: str | None = None
    """The environment variable that has the API key. Keys are never written anywhere."""
    calibrate_key_env: str | None = None
    """The same for --calibrate-from."""
    ca_file: Path | None = None
    """Certificates (PEM) that may sign those of the servers, besides the public authorities."""

    def check(self, *urls: str) -> None:
        """Raise BitassayError for what is no URL, MissingError for a variable that is not set."""
        from bitassay.audit.client import checked_url, require_variable

        for url in urls:
            checked_url(url)
        for variable in (self.key_env, self.calibrate_key_env):
            require_variable(variable)

    def target(self, url: str, model: str) -> "Target":
        """Return the server at `url`."""
        from bitassay.audit.client import Endpoint, Target

        return Target(Endpoint(url, self.key_env, ca_file=self.ca_file, seconds=self.timeout), model)

    def honest(self, urls: Iterable[str], model: str) -> "list[Target]":
        """Return the servers that calibrate."""
        return [replace(self, key_env=self.calibrate_key_env).target(url, model) for url in urls]


def replayed(
    recorded: Path,
    loader: "Loader",
    suspects: list[str],
    profile: Path | None,
    alpha: float | None,
    ledger: Path | None,
    output: options.RunOutput,
) -> int:
    """Judge a recorded audit again, by default with the recording's reference; return the exit status."""
    check_words([loader.name], [loader.recipe, *recipes_of(suspects)], folder=output.out, file=ledger)
    from bitassay.audit.judge import read_audit_profile
    from bitassay.audit.replay import read_recorded, replay

    was = read_recorded(recorded)
    known = None if profile is None else read_audit_profile(profile)
    if loader.name is None:
        check_words([was.reference.name])
        loader = replace(loader, name=was.reference.name)
    with show_progress() as progress:
        run, folder = replay(
            recorded,
            loader.reference(progress),
            alpha=alpha,
            profile=known,
            ledger=ledger,
            suspects=loader.suspects(suspects, progress),
            out=output.out,
            progress=progress,
        )
    return shown(run, folder, output)


def changed(
    target: "Target",
    reference: str | None,
    against: Path,
    asked: dict[str, Any],
    loading: options.Loading,
    output: options.RunOutput,
) -> int:
    """Compare a server with a recorded audit; return the exit status. asked: keywords of `change`."""
    from bitassay.audit.change import change
    from bitassay.audit.replay import read_recorded
    from bitassay.audit.wire import words_of

    name, trust = reference or read_recorded(against).reference.name, loading.trust_remote_code
    with show_progress() as progress:
        words = words_of(name, progress, trust_remote_code=trust)
        run, folder = change(against, target, *words, **asked, out=output.out, progress=progress)
    return shown(run, folder, output)


def kept_contract(
    servers: "list[Target]",
    reference: str,
    asked: dict[str, Any],
    loading: options.Loading,
    output: options.RunOutput,
) -> int:
    """Check what a server promises, and perhaps an honest one; return the exit status. asked: fields of
    Terms."""
    from bitassay.audit.contract_run import Terms, contract
    from bitassay.audit.wire import words_of

    if len(servers) > 2:
        raise BitassayError("--contract compares with one honest server", "one --calibrate-from")
    target, *honest = servers
    with show_progress() as progress:
        words, _ = words_of(reference, progress, trust_remote_code=loading.trust_remote_code)
        terms = Terms(**asked, out=output.out)
        compared = honest[0] if honest else None
        run, folder = contract(target, words, reference, terms, honest=compared, progress=progress)
    return shown(run, folder, output)


def shown(run: dict[str, Any], folder: Path, output: options.RunOutput) -> int:
    """Print a run and its decision; return the exit status."""
    output.show_run(run, folder)
    decision = run["decision"]
    print(f"{decision['status']}: {decision['why']}", file=sys.stderr)
    return 0 if decision["status"] == "PASS" else 1


def recipes_of(words: Iterable[str]) -> list[str]:
    """Return the suspects that are recipes."""
    from bitassay.audit.suspects import is_recipe

    return [word for word in words if is_recipe(word)]


@dataclass(frozen=True)
class Loader:
    """Loads the reference, and the models that may answer instead."""

    name: str | None
    recipe: str | None
    loading: options.Loading
    device: str

    def _load(self, dtype: options.Dtype, recipe: str | None, progress: "Progress") -> "PreTrainedModel":
        assert self.name is not None
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
        from bitassay.audit.suspects import suspect

        def load(recipe: str | None) -> "PreTrainedModel":
            return self._load("bfloat16", recipe or self.recipe, progress)

        return {word: suspect(word, load) for word in words}

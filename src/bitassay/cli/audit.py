"""`bitassay audit`: which model answers behind a URL?"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError, suggestion

Urls = Annotated[list[str], Parameter(negative=())]


def audit(
    url: str,
    /,
    *,
    model: str,
    reference: options.Model,
    recipe: options.RecipeName | None = None,
    calibrate_from: Urls | None = None,
    calibrate_model: str | None = None,
    profile: Path | None = None,
    evidence: str | None = None,
    top: options.Count = 20,
    tokens: options.Count = 128,
    requests: options.Count | None = None,
    budget: options.Count | None = None,
    calibration_requests: options.Count = 128,
    text: str = "c4-train-new",
    alpha: options.Alpha = 0.01,
    ledger: Path | None = None,
    seed: options.Seed | None = None,
    concurrency: options.Count = 4,
    timeout: options.Count = 120,
    key_env: str | None = None,
    calibrate_key_env: str | None = None,
    loading: options.Loading = options.Loading(),
    device: options.Device = "auto",
    output: options.RunOutput = options.RunOutput(),
) -> int:
    """Ask the server at URL, and judge its answers by a reference model of your own: PASS, FAIL or
    INCONCLUSIVE.

    The strongest evidence that the server gives is used: log-probabilities of given tokens, else of generated
    ones, else the greedy tokens themselves (docs/audit.md). What honest servers look like is learnt from
    --calibrate-from or a --profile; without either the distances are shown and nothing is decided. Every
    answer is kept at once; run again, the same command goes on. Exit status 0 for PASS, else 1.

    Args:
        url: The API's URL, such as https://host/v1. Requests go there and nowhere else.
        model: The model's name at the server.
        calibrate_from: URL of a server that you know to be honest, with the same engine and settings; may be
            repeated. Its profile is kept as profile.json in the run folder.
        calibrate_model: The model's name at those servers (default: --model).
        profile: A profile.json of an earlier audit.
        evidence: prompt-logprobs, logprobs, prompt-chosen, chosen or tokens (default: the strongest).
        top: Most likely tokens at each position, at most.
        tokens: Positions that are judged in each request.
        requests: How many requests (default: 16).
        budget: Tokens of prompts and answers that the audit may cost, instead of --requests; calibration is
            not counted.
        calibration_requests: Requests to each honest server.
        text: Where the texts are cut from: a protocol's name or a file of your own, .txt or .jsonl.
        ledger: Keep the answers' scores in this file from call to call, and judge all of them in their order:
            the false-positive rate then holds however often you look.
        seed: Of the places where texts are cut (default: drawn when the run folder is new, so that nobody can
            know them).
        concurrency: Requests at a time.
        timeout: Seconds that an answer may take.
        key_env: The environment variable that has the API key. Keys are never written anywhere.
        calibrate_key_env: The same for --calibrate-from.
    """
    from bitassay.audit.client import Endpoint, checked_url, require_variable
    from bitassay.audit.distance import LEVELS
    from bitassay.data.corpora import check_corpus

    if evidence is not None and evidence not in LEVELS:
        raise BitassayError(f"--evidence {evidence}: {suggestion(evidence, LEVELS)}", "leave it out")
    if requests is not None and budget is not None:
        raise BitassayError("--requests and --budget say the same", "leave one of them out")
    if calibrate_from and profile is not None:
        raise BitassayError("--calibrate-from makes a profile, --profile names one", "leave one of them out")
    for each in (url, *(calibrate_from or ())):
        checked_url(each)
    for variable in (key_env, calibrate_key_env):
        require_variable(variable)
    check_words([reference], [recipe], folder=output.out, file=ledger)
    check_corpus(text)
    from bitassay.audit.judge import Reference, read_audit_profile
    from bitassay.audit.run import audit
    from bitassay.audit.session import PROMPT_TOKENS, Options, Target

    known = None if profile is None else read_audit_profile(profile)
    wanted = Options(
        corpus=text,
        tokens=tokens,
        requests=requests or max((budget or 16 * (tokens + PROMPT_TOKENS)) // (tokens + PROMPT_TOKENS), 1),
        calibration_requests=calibration_requests,
        k=top,
        level=evidence,  # type: ignore[arg-type]
        alpha=alpha,
        seed=seed,
        concurrency=concurrency,
        ledger=ledger,
        out=output.out,
    )
    if budget is not None and budget < tokens + PROMPT_TOKENS:
        raise BitassayError(
            f"--budget {budget}: one request takes {tokens + PROMPT_TOKENS} tokens", "a larger one"
        )
    target = Target(Endpoint(url, key_env, seconds=timeout), model)
    honest = [
        Target(Endpoint(each, calibrate_key_env, seconds=timeout), calibrate_model or model)
        for each in calibrate_from or ()
    ]
    computing = options.Compute(**vars(loading), device=device)
    with show_progress() as progress:
        exact = computing.load(reference, recipe, progress=progress)
        control = replace(computing, dtype="bfloat16").load(reference, recipe, progress=progress)
        run, folder = audit(
            target, Reference(exact, control), wanted, honest=honest, profile=known, progress=progress
        )
    output.show_run(run, folder)
    decision = run["decision"]
    print(f"{decision['status']}: {decision['why']}", file=sys.stderr)
    return 0 if decision["status"] == "PASS" else 1

"""`bitassay audit`: which model answers behind a URL?"""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bitassay.cli import options
from bitassay.cli.audit_modes import ALPHA, Loader, changed, kept_contract, recipes_of, replayed, shown
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError, suggestion

Urls = Annotated[list[str], Parameter(negative=())]


def audit(
    url: str | None = None,
    /,
    *,
    model: str | None = None,
    reference: Annotated[
        options.Model | None,
        Parameter(
            help="The model that should answer, to judge by (default of --replay and --against: that of the "
            "recording)."
        ),
    ] = None,
    recipe: options.RecipeName | None = None,
    replay: Path | None = None,
    watch: options.Interval | None = None,
    times: options.Count | None = None,
    against: Path | None = None,
    repeats: options.Count | None = None,
    contract: options.Flag = False,
    chat: options.Flag = False,
    context: options.Count | None = None,
    calibrate_from: Urls | None = None,
    calibrate_model: str | None = None,
    profile: Path | None = None,
    suspects: options.Names | None = None,
    evidence: str | None = None,
    top: options.Count = 20,
    tokens: options.Count = 128,
    requests: options.Count | None = None,
    budget: options.Count | None = None,
    calibration_requests: options.Count = 128,
    text: str = "c4-train-new",
    alpha: Annotated[
        options.Alpha | None,
        Parameter(
            help="False-positive rate: how often an honest server may be refused (default: 0.01; of "
            "--replay: as recorded)."
        ),
    ] = None,
    ledger: Path | None = None,
    seed: Annotated[
        options.Seed | None,
        Parameter(
            help="Of the places where texts are cut (default: drawn when the run folder is new, so that "
            "nobody can know them)."
        ),
    ] = None,
    concurrency: options.Count = 4,
    timeout: options.Count = 120,
    key_env: str | None = None,
    calibrate_key_env: str | None = None,
    ca_file: Path | None = None,
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

    --replay judges the kept answers of an earlier audit again, without any request. --watch audits again and
    again, with one promise over all time. --against asks the requests of an earlier audit again, and says
    whether the endpoint has changed; --contract checks counts, limits, stops, streams, the context and tools:
    both need no model but the tokenizer.

    Args:
        url: The API's URL, such as https://host/v1. Requests go there and nowhere else.
        model: The model's name at the server.
        replay: The run folder of an earlier audit, to judge its kept answers again.
        watch: Audit every 90s, 30m, 6h or 1d, until the ledger refuses the server or --times audits are done.
            Needs --calibrate-from or --profile.
        times: How many audits (default: until interrupted).
        against: The run folder of an earlier audit, whose requests are asked again.
        repeats: How often each of them is asked (default: 3).
        contract: Check what the server promises, beside one honest server where --calibrate-from names it.
        context: Tokens of the context that the server advertises (default: what its /models says).
        calibrate_from: URL of a server that you know to be honest, with the same engine and settings; may be
            repeated. Its profile is kept as profile.json in the run folder.
        calibrate_model: The model's name at those servers (default: --model).
        profile: A profile.json of an earlier audit.
        suspects: What may be done instead: recipes such as w8,fp8,w4, a cache in fewer bits (kv8, kv4),
            system=FILE, template=FILE, context=50%, temperature=0.8, top_p=1. Says which of these, or the
            reference itself, is nearest to the answers.
        evidence: prompt-logprobs, logprobs, prompt-chosen, chosen, tokens, text or sampled (default: the
            strongest).
        chat: Ask by messages, so that the server's chat template and system prompt are audited too.
        top: Most likely tokens at each position, at most.
        tokens: Positions that are judged in each request.
        requests: How many requests (default: 16).
        budget: Tokens of prompts and answers that the audit may cost, instead of --requests; calibration is
            not counted.
        calibration_requests: Requests to each honest server.
        text: Where the texts are cut from: a protocol's name or a file of your own, .txt or .jsonl.
        ledger: Keep the answers' scores in this file from call to call, and judge all of them in their order:
            the false-positive rate then holds however often you look.
        concurrency: Requests at a time.
        timeout: Seconds that an answer may take.
        key_env: The environment variable that has the API key. Keys are never written anywhere.
        calibrate_key_env: The same for --calibrate-from.
        ca_file: Certificates (PEM) that may sign those of the servers, besides the public authorities.
    """
    named = [each for word in suspects or () for each in word.split(",") if each]
    asked = {"--tokens": tokens if tokens != 128 else None, "--top": top if top != 20 else None}
    if replay is not None:
        given = {"a URL": url, "--model": model, "--calibrate-from": calibrate_from, "--seed": seed}
        given |= {"--evidence": evidence, "--requests": requests, "--budget": budget, "--key-env": key_env}
        given |= {"--watch": watch, "--against": against, "--contract": contract or None} | asked
        given |= {"--chat": chat or None, "--ca-file": ca_file}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise BitassayError(f"--replay asks nothing, so {wrong[0]} says nothing", "leave it out")
        return replayed(replay, reference, recipe, named, profile, alpha, ledger, loading, device, output)
    for name, value, needs, given in (
        ("--times", times, "--watch", watch),
        ("--repeats", repeats, "--against", against),
        ("--context", context, "--contract", contract),
    ):
        if value is not None and not given:
            raise BitassayError(f"{name} says nothing without {needs}", f"add {needs}, or leave it out")
    if url is not None and model is not None and against is not None:
        given = {"--calibrate-from": calibrate_from, "--profile": profile, "--ledger": ledger}
        given |= {"--evidence": evidence, "--requests": requests, "--budget": budget, "--watch": watch}
        given |= {"--suspects": suspects, "--recipe": recipe, "--contract": contract or None} | asked
        given |= {"--chat": chat or None}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise BitassayError(f"--against needs no {wrong[0]}", "leave it out")
        return changed(
            url,
            model,
            reference,
            against,
            repeats,
            alpha,
            seed,
            concurrency,
            timeout,
            key_env,
            ca_file,
            loading,
            output,
        )
    if url is not None and model is not None and reference is not None and contract:
        given = {"--profile": profile, "--ledger": ledger, "--evidence": evidence, "--budget": budget}
        given |= {"--watch": watch, "--suspects": suspects, "--recipe": recipe, "--chat": chat or None}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise BitassayError(f"--contract needs no {wrong[0]}", "leave it out")
        servers = [(url, model, key_env)]
        servers += [(each, calibrate_model or model, calibrate_key_env) for each in calibrate_from or ()]
        return kept_contract(
            servers,
            reference,
            text,
            requests,
            context,
            alpha,
            seed,
            concurrency,
            timeout,
            ca_file,
            loading,
            output,
        )
    if url is None or model is None or reference is None:
        missing = "a URL" if url is None else "--model" if model is None else "--reference"
        raise BitassayError(
            f"{missing} is missing", "bitassay audit https://host/v1 --model NAME --reference MODEL"
        )
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
    check_words([reference], [recipe, *recipes_of(named)], folder=output.out, file=ledger)
    check_corpus(text)
    from bitassay.audit.judge import read_audit_profile
    from bitassay.audit.run import audit
    from bitassay.audit.session import PROMPT_TOKENS, Options, Target
    from bitassay.audit.watch import watch as watched

    known = None if profile is None else read_audit_profile(profile)
    wanted = Options(
        corpus=text,
        tokens=tokens,
        requests=requests or max((budget or 16 * (tokens + PROMPT_TOKENS)) // (tokens + PROMPT_TOKENS), 1),
        calibration_requests=calibration_requests,
        k=top,
        level=evidence,  # type: ignore[arg-type]
        alpha=ALPHA if alpha is None else alpha,
        seed=seed,
        chat=chat,
        concurrency=concurrency,
        ledger=ledger,
        out=output.out,
    )
    if budget is not None and budget < tokens + PROMPT_TOKENS:
        raise BitassayError(
            f"--budget {budget}: one request takes {tokens + PROMPT_TOKENS} tokens", "a larger one"
        )
    target = Target(Endpoint(url, key_env, ca_file=ca_file, seconds=timeout), model)
    honest = [
        Target(Endpoint(each, calibrate_key_env, ca_file=ca_file, seconds=timeout), calibrate_model or model)
        for each in calibrate_from or ()
    ]
    loaded = Loader(reference, recipe, loading, device)
    if watch is not None and not honest and known is None:
        raise BitassayError("--watch needs to know what honest servers look like", "--calibrate-from URL")
    with show_progress() as progress:
        if watch is not None:
            run, folder = watched(
                target,
                loaded.reference(progress),
                wanted,
                watch,
                times=times,
                honest=honest,
                profile=known,
                suspects=loaded.suspects(named, progress),
                progress=progress,
                tell=lambda text: print(text, file=sys.stderr, flush=True),
            )
            return shown(run, folder, output)
        run, folder = audit(
            target,
            loaded.reference(progress),
            wanted,
            honest=honest,
            profile=known,
            suspects=loaded.suspects(named, progress),
            progress=progress,
        )
    return shown(run, folder, output)

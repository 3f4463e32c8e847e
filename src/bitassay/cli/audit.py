"""`bitassay audit`: which model answers behind a URL?"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from bitassay.cli import options
from bitassay.cli.audit_modes import (
    ALPHA,
    Connection,
    Loader,
    changed,
    kept_contract,
    mode_of,
    recipes_of,
    replayed,
    shown,
)
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
    connection: Connection = Connection(),
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
    """
    named = [each for word in suspects or () for each in word.split(",") if each]
    given = {"--replay": replay, "--against": against, "--contract": contract or None, "--watch": watch}
    given |= {"--times": times, "--repeats": repeats, "--context": context, "--chat": chat or None}
    given |= {"a URL": url, "--model": model, "--recipe": recipe, "--suspects": suspects, "--seed": seed}
    given |= {"--calibrate-from": calibrate_from, "--profile": profile, "--ledger": ledger}
    given |= {"--evidence": evidence, "--requests": requests, "--budget": budget}
    given |= {"--tokens": tokens if tokens != 128 else None, "--top": top if top != 20 else None}
    mode = mode_of(given | {"--key-env": connection.key_env, "--ca-file": connection.ca_file})
    loader = Loader(reference, recipe, loading, device)
    if replay is not None:
        return replayed(replay, loader, named, profile, alpha, ledger, output)
    if url is None or model is None or (reference is None and against is None):
        missing = "a URL" if url is None else "--model" if model is None else "--reference"
        raise BitassayError(
            f"{missing} is missing", "bitassay audit https://host/v1 --model NAME --reference MODEL"
        )
    calibrating = calibrate_from or []
    connection.check(url, *calibrating)
    check_words([reference], [recipe, *recipes_of(named)], folder=output.out, file=ledger)
    asked = {"alpha": ALPHA if alpha is None else alpha, "concurrency": connection.concurrency}
    if against is not None:
        asked |= {"seed": seed or 0} | ({} if repeats is None else {"repeats": repeats})
        return changed(connection.target(url, model), reference, against, asked, loading, output)
    assert reference is not None
    from bitassay.data.corpora import check_corpus

    check_corpus(text)
    honest = connection.honest(calibrating, calibrate_model or model)
    if mode == "--contract":
        asked |= {"corpus": text, "context": context, "seed": seed or 0}
        asked |= {} if requests is None else {"requests": requests}
        servers = [connection.target(url, model), *honest]
        return kept_contract(servers, reference, asked, loading, output)
    from bitassay.audit.distance import LEVELS
    from bitassay.audit.judge import read_audit_profile
    from bitassay.audit.run import audit
    from bitassay.audit.session import PROMPT_TOKENS, Options
    from bitassay.audit.watch import watch as watched

    if evidence is not None and evidence not in LEVELS:
        raise BitassayError(f"--evidence {evidence}: {suggestion(evidence, LEVELS)}", "leave it out")
    if requests is not None and budget is not None:
        raise BitassayError("--requests and --budget say the same", "leave one of them out")
    if calibrating and profile is not None:
        raise BitassayError("--calibrate-from makes a profile, --profile names one", "leave one of them out")
    cost = tokens + PROMPT_TOKENS  # of a request
    if budget is not None and budget < cost:
        raise BitassayError(f"--budget {budget}: one request takes {cost} tokens", "a larger one")
    known = None if profile is None else read_audit_profile(profile)
    if watch is not None and not honest and known is None:
        raise BitassayError("--watch needs to know what honest servers look like", "--calibrate-from URL")
    wanted = Options(
        tokens=tokens,
        requests=requests or (16 if budget is None else budget // cost),
        calibration_requests=calibration_requests,
        k=top,
        level=evidence,  # type: ignore[arg-type]
        chat=chat,
        ledger=ledger,
        out=output.out,
        **asked | {"corpus": text, "seed": seed},
    )
    with show_progress() as progress:
        target, standard = connection.target(url, model), loader.reference(progress)
        judging: dict[str, Any] = {"honest": honest, "profile": known, "progress": progress}
        judging["suspects"] = loader.suspects(named, progress)
        if watch is None:
            run, folder = audit(target, standard, wanted, **judging)
        else:
            tell = partial(print, file=sys.stderr, flush=True)
            run, folder = watched(target, standard, wanted, watch, times=times, tell=tell, **judging)
    return shown(run, folder, output)

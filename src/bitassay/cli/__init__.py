"""The command line: `bitassay VERB`. Verbs are imported when they are called, so that `--help` is instant.

Results go to stdout, progress and logs to stderr. Exit status: 0 done or PASS, 1 FAIL or INCONCLUSIVE, 2 bad
usage or bad input, 3 something missing in the environment, 130 interrupted. An expected error is one message
without a traceback; `--debug` shows the traceback.
"""

import os
import sys
from contextlib import nullcontext

from cyclopts import App, CycloptsError

from bitassay import __version__
from bitassay.cli.quiet import quiet
from bitassay.errors import BitassayError, suggestion
from bitassay.record.text import escaped

VERBS = {
    "assay": "Quantize a model by several recipes; one table of the costs, and whether a verifier notices.",
    "quantize": "Quantize a model by a recipe and save it as a checkpoint that transformers loads.",
    "eval": "Measure perplexity, divergence or tasks: of one model, or of one against another.",
    "generate": "Compare the texts that quantized models generate with those of the base model.",
    "bench": "Time models and compare them with the limits of the machine; `bench matmul` times products.",
    "prove": "Generate text and write a trace that shows which model ran.",
    "verify": "Check a trace against a model of your own: PASS, FAIL or INCONCLUSIVE.",
    "challenge": "Draw the positions that the host behind a signed receipt must open.",
    "open": "Answer a challenge: write the challenged hidden states of a trace, with the proof.",
    "receipts": "Check signed receipts, and find requests that a host has answered twice.",
    "audit": "Find out which model answers behind a URL: PASS, FAIL or INCONCLUSIVE.",
    "serve": "Serve a model over HTTP as OpenAI's API does, with a signed receipt for every answer.",
    "committee": "Let several verifiers judge; canaries expose those that do not look.",
    "calibrate": "Fit a verification profile to honest runs on this machine.",
    "attack": "Attack the verifier of a model in every known way; show which detector catches what.",
    "study": "List and run the experiments: what fixed thresholds accept, and what they catch.",
    "search": "Find the best recipes of a space, for several objectives and within limits.",
    "report": "Turn run folders into one HTML file that opens offline.",
    "models": "List, pull and check models.",
    "recipes": "List the shipped recipes or print one.",
    "doctor": "Check Python, packages, devices, disk and models.",
}


def application(with_summaries: bool = False) -> App:
    """Return the application. With summaries nothing is imported to list the verbs; without them, the help of
    a verb is the docstring of its function."""
    # Otherwise cyclopts exits at Ctrl-C without a word on what to do next.
    app = App(
        name="bitassay",
        help="Fewer bits, known cost, provable identity for language models.",
        version=__version__,
        suppress_keyboard_interrupt=False,
    )
    for verb, summary in VERBS.items():
        app.command(f"bitassay.cli.{verb}:{verb}", name=verb, help=summary if with_summaries else None)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    # Large tensors in pages of 2 MB, where Linux has them on request: fewer page faults. PyTorch reads this
    # once, when it first needs memory.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    sys.exit(run(arguments, debug))


def run(arguments: list[str], debug: bool = False) -> int:
    """Run one command line and return its exit status; with `debug`, exceptions propagate."""
    verb = arguments[0] if arguments and arguments[0] in VERBS else None
    try:
        # Left to cyclopts, an unknown verb imports all the others to describe them.
        if arguments and not arguments[0].startswith("-") and verb is None:
            raise BitassayError(
                f"no verb is called {arguments[0]!r}; {suggestion(arguments[0], VERBS)}", "bitassay --help"
            )
        with nullcontext() if debug else quiet():
            app = application(with_summaries=verb is None)
            result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()  # here, where a reader that went away or a full disk can still be dealt with
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        print(
            "\ninterrupted; finished parts are kept: run the same command again to continue", file=sys.stderr
        )
        return 130
    except BrokenPipeError:
        _drop_output()
        return 0
    except (BitassayError, CycloptsError, MemoryError, OSError) as error:
        if debug:
            raise
        if isinstance(error, OSError):
            _drop_output()
        message, status = _explained(error, verb)
        print(f"error: {escaped(message)}", file=sys.stderr)
        return status


def _explained(error: Exception, verb: str | None) -> tuple[str, int]:
    """Return what to say of an expected error, and the exit status."""
    match error:
        case BitassayError():
            return str(error), error.exit_status
        case CycloptsError():
            return f"{error}\n  try: {' '.join(filter(None, ('bitassay', verb)))} --help", 2
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{error.strerror or error}", 3
    return "out of memory\n  try: a smaller model, fewer recipes, or a shorter --window", 3


def _drop_output() -> None:
    """Forget output that cannot be written, lest Python try again at exit and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

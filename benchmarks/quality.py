"""Our recipes beside the best packages: the same model, calibration tokens and windows, at stated bits.

    calibration   128 samples of 512 tokens of C4, the same ids for every tool that takes any
    evaluation    16 windows of 1024 tokens, evenly spaced over WikiText-2's raw test set
    quantized     every linear of the decoder's layers; embeddings and the head stay as they are

A peer runs in an environment of its own, made here where it is absent (~/.cache/bitassay-peers/TOOL, or below
BITASSAY_PEERS), and hands back the weights that its own checkpoint decodes to: `peers/run_TOOL.py`. A recipe
of ours runs as `bitassay quantize`, and the folder that it wrote is what is measured.

`bits_per_weight` counts codes, 16-bit scales (bitsandbytes has 32), and zero points as the tool stores them;
`checkpoint_bits_per_weight` also what the tool's packing wastes and indices that could be left out. `seconds`
are of quantization alone for a peer, of the whole command for a recipe of ours; `cpu_seconds` and
`peak_bytes` are of the whole process for both; what was interrupted and gone on with has no times.
`pairs` compares each recipe with each peer of equal bits and group, `steps` with the recipe before it: the
difference of mean KL, with a bootstrap interval over windows, which both saw alike.

Every finished row is a file below OUT/parts, and the same command goes on after the last one: remove a file
to measure its row again. Rows are kept in `results/quality-MODEL`: with --out there, new ones are paired with
them. A tool that refuses (a group that does not divide a row, say) is listed with its last words and tried
again next time. Run: OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python
benchmarks/quality.py [--model smollm2-135m] [--bits 4 3 2 1] [--groups 64 128] [--tools autoround gptqmodel
llmcompressor bitsandbytes hqq] [--recipe NAME ...] [--out runs/quality] [--format table|json]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import nan
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import bitassay
from bitassay.data.windows import Protocol, token_windows
from bitassay.errors import BitassayError, MissingError
from bitassay.evaluation.quality import score_windows, summarise
from bitassay.evaluation.statistics import log_difference_interval, mean_of
from bitassay.models.identity import tokenizer
from bitassay.models.walk import walk
from bitassay.quantization.recipe.formats import FORMATS
from bitassay.quantization.recipe.recipe import BASE, Recipe, find_recipe
from bitassay.quantization.runtime.model import bits_per_weight, copy_sharing_parameters
from bitassay.record.environment import environment
from bitassay.record.files import read_json, write_text
from bitassay.record.run import RunFolder

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parent / "constraints.txt"
TORCH = "torch==2.13.0"  # a build for the CPU; another version brings gigabytes of CUDA
CALIBRATION = Protocol("c4-train", window_tokens=512, windows=128)
EVALUATION = Protocol(window_tokens=1024, windows=16)
SEED = 0
UNTIMED = dict.fromkeys(("seconds", "cpu_seconds", "peak_bytes"))  # of a run gone on with: not all is in them
LAST_WORDS = 400  # characters of a failed tool's output


class Refused(Exception):
    """A tool that ended without a result; the message is the end of what it printed."""


@dataclass(frozen=True)
class Peer:
    """A package: what it can do here, and the pip commands that install it."""

    bits: tuple[float, ...]
    installs: tuple[tuple[str, ...], ...]
    environment: dict[str, str] = field(default_factory=dict)


PEERS = {
    "autoround": Peer(
        (4, 3, 2), (("-c", str(CONSTRAINTS), TORCH), ("-c", str(CONSTRAINTS), "auto-round==0.16.1"))
    ),
    # It asks for a later torch, but runs with this one: hence without dependencies, and those by name.
    "gptqmodel": Peer(
        (4, 3, 2),
        (
            ("-c", str(CONSTRAINTS), TORCH, "setuptools", "wheel"),
            (
                *("-c", str(CONSTRAINTS), "accelerate", "numpy", "safetensors", "filelock", "transformers"),
                *("threadpoolctl", "packaging", "device-smi", "protobuf", "pillow", "requests", "pypcre"),
                *("tokenicer", "logbar", "jinja2", "ninja", "maturin", "datasets", "pyarrow", "dill"),
                *("torchao==0.18.0", "defuser"),
            ),
            ("--no-deps", "gptqmodel==7.7.0"),
        ),
    ),
    # It pins an older transformers than constraints.txt does.
    "llmcompressor": Peer((4, 3, 2), ((TORCH,), (TORCH, "llmcompressor==0.14.0.1"))),
    # 8 bits is LLM.int8(), which rounds inputs too; 4 is NF4.
    "bitsandbytes": Peer(
        (8, 4),
        (
            ("-c", str(CONSTRAINTS), TORCH),
            ("-c", str(CONSTRAINTS), "bitsandbytes==0.50.2", "transformers", "accelerate", "safetensors"),
        ),
    ),
    "hqq": Peer(
        (4, 3, 2, 1.58, 1),
        (("-c", str(CONSTRAINTS), TORCH), ("-c", str(CONSTRAINTS), "hqq==0.2.8.post1")),
        {"DISABLE_CUDA": "1"},
    ),
}


def interpreter(tool: str) -> Path:
    """The peer's own Python; its environment is made where it is absent or was made by other commands."""
    folder = Path(os.environ.get("BITASSAY_PEERS", "~/.cache/bitassay-peers")).expanduser() / tool
    python, ready, installs = folder / "bin/python", folder / "ready.json", PEERS[tool].installs
    constraints = CONSTRAINTS.read_text()
    made_by = [[word.replace(str(CONSTRAINTS), constraints) for word in install] for install in installs]
    if ready.exists() and read_json(ready) == made_by:
        return python
    print(f"making {folder}", file=sys.stderr)
    commands = [[sys.executable, "-m", "venv", str(folder)]]
    commands += [[str(python), "-m", "pip", "install", "-q", *install] for install in installs]
    for command in commands:
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | PEERS[tool].environment, check=False
        )
        if done.returncode:
            raise MissingError(
                f"{tool}: {' '.join(command)} failed: {done.stderr[-LAST_WORDS:]}",
                f"leave it out of --tools, or install it by hand into {folder}",
            )
    write_text(ready, json.dumps(made_by))
    return python


def run(command: Sequence[str | Path], log: Path) -> dict[str, float]:
    """Run a tool, keep what it prints in `log`, and return what the whole process took."""
    with open(log, "wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen([str(word) for word in command], stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
    if status:
        raise Refused(log.read_text(errors="replace").strip()[-LAST_WORDS:])
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


class Said:
    """A candidate that is known by its last hidden states [windows, tokens, hidden], in the order in which it
    is asked; the output head is the base model's."""

    def __init__(self, base: PreTrainedModel, states: Tensor):
        self.config, self.device = base.config, base.device
        self.head, self.states = base.get_output_embeddings(), iter(states)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, use_cache: bool) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(next(self.states))[None])


class Bench:
    """One model, its tokens, and the folder of what was measured on it."""

    def __init__(self, name: str, out: Path, iters: int):
        self.name, self.iters = name, iters
        plan = {
            "model": name,
            "calibration": CALIBRATION.id,
            "evaluation": EVALUATION.id,
            "autoround_iters": iters,
            "seed": SEED,
        }
        self.folder = RunFolder(out, plan)
        self.work = out / "work"
        self.dense, self.tokens = self.work / "model", self.work / "calibration.safetensors"
        if not self.tokens.exists():  # written last
            base = bitassay.load(name)
            base.save_pretrained(self.dense)
            tokenizer(base).save_pretrained(self.dense)
            protocols = {"tokens": CALIBRATION, "windows": EVALUATION}
            save_file(
                {key: token_windows(tokenizer(base), one)[0] for key, one in protocols.items()}, self.tokens
            )

    @cached_property
    def base(self) -> PreTrainedModel:
        """Loaded when something is to be scored: a tool that runs before has the memory to itself."""
        return bitassay.load(self.name)

    def score(self, candidate: PreTrainedModel | Tensor | None) -> dict[str, Any]:
        """Figures of a candidate, of a candidate's last hidden states [windows, tokens, hidden], or of the
        base itself, with its means by window."""
        if isinstance(candidate, Tensor):
            candidate = Said(self.base, candidate)  # type: ignore[assignment]
        named: Any = {} if candidate is None else {"candidate": candidate}
        found = [scores for _, scores in score_windows(self.base, named, load_file(self.tokens)["windows"])]
        base = [scores[BASE] for scores in found]
        scores = [scores["candidate"] for scores in found] if named else base
        quality = summarise(scores, base)
        return {
            **{key: getattr(quality, key) for key in ("ppl", "ppl_ci", "kl_mean", "kl_ci", "top1_agreement")},
            "kl_by_window": [window.kl.double().mean().item() for window in scores],
            "nll_by_window": [window.nll.double().mean().item() for window in scores],
        }

    def unquantized(self) -> dict[str, Any]:
        row = {"tool": "none", "bits": 32, "group": None, "bits_per_weight": 32.0}
        return self.folder.part("unquantized", lambda: {"model": self.name, **row, **self.score(None)})

    def done(self, place: Path, command: Sequence[str | Path]) -> dict[str, Any]:
        """What a command cost that works in the folder `place`, and what it reports there; one that had come
        to its end before its result was scored is not run again."""
        kept, report, resumed = place / "usage.json", place / "report.json", place.exists()
        if not kept.exists():
            place.mkdir(parents=True, exist_ok=True)
            usage = run(command, place.with_name(f"{place.name}.log"))
            usage |= (read_json(report) if report.exists() else {}) | (UNTIMED if resumed else {})
            write_text(kept, json.dumps(usage))
        return read_json(kept)

    def peer(self, tool: str, bits: float, group: int, dtype: str = "float32") -> dict[str, Any]:
        """dtype: what GPTQModel loads the model in."""
        name = f"{tool}-{bits:g}bit-g{group}" + (f"-{dtype}" if dtype != "float32" else "")

        def measure() -> dict[str, Any]:
            place = self.work / name
            command = [
                *(interpreter(tool), HERE / "peers" / f"run_{tool}.py", "--model", self.dense),
                *("--tokens", self.tokens, "--bits", f"{bits:g}", "--group", str(group)),
                *("--out", place, "--iters", str(self.iters), "--dtype", dtype),
            ]
            row = {"model": self.name, "tool": tool, "bits": bits, "group": group}
            row |= self.done(place, command)
            states = place / "states.safetensors"
            if states.exists():
                row |= self.score(load_file(states)["states"])
            else:
                row |= self.score(with_weights(self.base, load_file(place / "weights.safetensors")))
            shutil.rmtree(place)
            return row

        return self.folder.part(name, measure)

    def recipe(self, recipe: Recipe, given: str) -> dict[str, Any]:
        name = f"bitassay-{recipe.name}-{recipe.recipe_id[:8]}"

        def measure() -> dict[str, Any]:
            place = self.work / name
            command = [
                *(sys.executable, "-m", "bitassay.cli", "quantize", self.name, "--recipe", given),
                *("--out", place / "checkpoint", "--work", place / "steps", "--no-check", "--format", "json"),
            ]
            usage = self.done(place, command)
            candidate = bitassay.load(place / "checkpoint")
            row = {
                "model": self.name,
                "tool": f"bitassay {recipe.name}",
                "version": f"bitassay {bitassay.__version__} (torch {torch.__version__})",
                "settings": recipe.model_dump(mode="json", exclude_none=True, exclude={"description"}),
                **bits_and_group(recipe),
                "bits_per_weight": bits_per_weight(candidate),
                "threads": torch.get_num_threads(),
                **usage,
                **self.score(candidate),
            }
            shutil.rmtree(place)
            return row

        return self.folder.part(name, measure)


def with_weights(base: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A copy of `base` with a peer's matrices, which must be all that the decoder's layers have."""
    model = copy_sharing_parameters(base)
    linears = walk(model).linears
    assert linears.keys() == weights.keys(), f"not the decoder's linears: {linears.keys() ^ weights.keys()}"
    for name, linear in linears.items():
        assert linear.weight.shape == weights[name].shape, name
        assert weights[name].isfinite().all(), f"{name}: NaN or infinite"
        linear.weight = nn.Parameter(weights[name].to(linear.weight.dtype), requires_grad=False)
    return model


def bits_and_group(recipe: Recipe) -> dict[str, Any]:
    """By what a recipe is paired with peers: the bits of a code (a ternary one counts as 1.58) and the
    group."""
    assert recipe.weights is not None
    found = FORMATS[recipe.weights.format]
    granularity = str(recipe.weights.granularity)
    return {
        "bits": 1.58 if found.kind == "ternary" else found.bits,
        "group": int(granularity[1:]) if granularity[:1] == "g" and granularity[1:].isdigit() else None,
    }


def difference(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Mean KL of one row less that of another; below zero the first is closer to the base model."""
    one, two = (mean_of(row["kl_by_window"]) for row in (ours, other))
    return {
        "kl_difference": one.value - two.value,
        "kl_difference_ci": log_difference_interval(two, one),
    }


def is_ours(row: dict[str, Any]) -> bool:
    return row["tool"].startswith("bitassay ")


def pairs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each recipe of ours less each peer of equal bits and group."""
    return [
        {
            "ours": ours["tool"],
            "peer": peer["tool"],
            "bits": ours["bits"],
            "group": ours["group"],
            "bits_per_weight": [ours["bits_per_weight"], peer["bits_per_weight"]],
            **difference(ours, peer),
        }
        for ours in filter(is_ours, rows)
        for peer in rows
        if peer["tool"] in PEERS and (ours["bits"], ours["group"]) == (peer["bits"], peer["group"])
    ]


def steps(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each recipe of ours less the one before it."""
    return [
        {"ours": row["tool"], "other": before["tool"], **difference(row, before)}
        for before, row in pairwise(filter(is_ours, rows))
    ]


def main(given: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(given.model, given.out, given.iters)
    wanted = [
        (f"{tool} {bits:g} bits g{group}", lambda t=tool, b=bits, g=group: bench.peer(t, b, g))
        for tool in given.tools
        for group in given.groups
        for bits in given.bits
        if bits in PEERS[tool].bits
    ]
    wanted += [(f"recipe {name}", lambda n=name: bench.recipe(find_recipe(n), n)) for name in given.recipe]
    rows, refused = [bench.unquantized()], []
    for what, measure in wanted:
        print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)
        try:
            rows.append(measure())
        except (Refused, BitassayError) as error:
            refused.append({"what": what, "reason": str(error)})
            print(f"{what} refused: {error}", file=sys.stderr, flush=True)
    return {
        "protocol": bench.folder.plan,
        "rows": rows,
        "pairs": pairs(rows),
        "steps": steps(rows),
        "refused": refused,
        "environment": environment(),
    }


def show(result: dict[str, Any]) -> None:
    def interval(row: dict[str, Any], key: str) -> str:
        return f"{row[key]:.4g} [{row[key + '_ci'][0]:.4g}, {row[key + '_ci'][1]:.4g}]"

    head = f"{'tool':24} {'bits':>5} {'group':>5} {'bits/w':>7} {'ppl [95 %]':30} {'KL [95 %]':32} "
    print(head + f"{'seconds':>8} {'peak GB':>8}")
    for row in result["rows"]:
        print(
            f"{row['tool']:24} {row['bits']:5g} {row['group'] or '':>5} {row['bits_per_weight']:7.3f} "
            f"{interval(row, 'ppl'):30} "
            f"{interval(row | {'kl': row['kl_mean']}, 'kl'):32} "
            f"{row.get('seconds') or nan:8.0f} {(row.get('peak_bytes') or nan) / 1e9:8.2f}"
        )
    for pair in result["pairs"]:
        print(
            f"{pair['ours']} - {pair['peer']} at {pair['bits']:g} bits, group {pair['group']}: "
            f"KL {interval(pair, 'kl_difference')}"
        )
    for step in result["steps"]:
        print(f"{step['ours']} - {step['other']}: KL {interval(step, 'kl_difference')}")
    for refusal in result["refused"]:
        print(f"{refusal['what']}: refused, {refusal['reason'].splitlines()[-1]}")


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--bits", type=float, nargs="+", default=[4, 3, 2, 1.58, 1])
    options.add_argument("--groups", type=int, nargs="+", default=[64, 128])
    options.add_argument("--tools", nargs="*", choices=PEERS, default=list(PEERS))
    options.add_argument("--recipe", nargs="*", default=[])
    options.add_argument("--iters", type=int, default=200, help="AutoRound's steps for each block")
    options.add_argument("--out", type=Path, default=Path("runs/quality"))
    options.add_argument("--format", choices=("table", "json"), default="table")
    chosen = options.parse_args()
    measured = main(chosen)
    print(json.dumps(measured, indent=2)) if chosen.format == "json" else show(measured)

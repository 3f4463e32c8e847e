"""Options that several verbs share. Each is declared, described and checked here, once.

A group is a frozen dataclass whose fields are options; a verb takes it as one parameter, and a verb with
other defaults takes a subclass. An option that every verb with a model should have becomes a field of
`Loading`. Values are checked while the command line is parsed, before anything heavy is imported.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, dataclass_transform

from cyclopts import Parameter, Token
from cyclopts.validators import Number

from bitassay.cli.output import Format, Table, print_tables
from bitassay.errors import BitassayError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bitassay.engines.sampling import Sampler
    from bitassay.record.progress import Progress


def _integer(_: Any, tokens: Sequence[Token]) -> Any:
    """Refuse 1.5, which cyclopts by itself rounds to 1."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f'unable to convert "{tokens[0].value}" into int.') from None


def _seed_or_nonce(_: Any, tokens: Sequence[Token]) -> Any:
    text = tokens[0].value
    if text == "nonce":
        return text
    try:
        seed = int(text)
    except ValueError:
        raise ValueError(f'"{text}" is neither a number nor the word "nonce".') from None
    if not 0 <= seed < 2**63:
        raise ValueError("A seed is between 0 and 2^63 - 1.")
    return seed


UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def _bytes(_: Any, tokens: Sequence[Token]) -> int:
    """Read 16GB or 800MB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]+)", tokens[0].value.strip().lower())
    if found is None or found[2] not in UNITS:
        raise ValueError(f'"{tokens[0].value}" is no amount of memory, such as 16GB or 800MB.')
    return int(float(found[1]) * UNITS[found[2]])


def _seconds(_: Any, tokens: Sequence[Token]) -> float:
    """Read 90s, 30m, 6h or 1d."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([smhd])", tokens[0].value.strip().lower())
    if found is None or not float(found[1]):
        raise ValueError(f'"{tokens[0].value}" is no interval, such as 90s, 30m, 6h or 1d.')
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _is_fraction(_: Any, value: float | None) -> None:
    if value is not None and not 0 < value < 1:  # also refuses NaN
        raise ValueError("Must be between 0 and 1.")


def _is_device(_: Any, text: str | None) -> None:
    if text is not None and not re.fullmatch(r"[a-z]+(:\d+)?", text):
        raise ValueError("A device is cpu, cuda, cuda:1 or mps; auto finds one.")


Flag = Annotated[bool, Parameter(negative=())]
Names = Annotated[list[str], Parameter(consume_multiple=True, negative=())]
Numbers = Annotated[list[int], Parameter(consume_multiple=True, negative=())]
Counts = Annotated[list[int], Parameter(consume_multiple=True, negative=(), validator=Number(gte=1))]
Count = Annotated[int, Parameter(validator=Number(gte=1), converter=_integer)]
CountFromZero = Annotated[int, Parameter(validator=Number(gte=0), converter=_integer)]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Interval = Annotated[float, Parameter(converter=_seconds)]
Memory = Annotated[int, Parameter(converter=_bytes)]
StateDtype = Literal["float32", "bfloat16", "float16"]
Precision = Literal["fp16", "bf16", "fp32"]

Model = Annotated[
    str, Parameter(help="A name from `bitassay models list`, a folder, a .gguf file or a hub id.")
]
RecipeName = Annotated[str, Parameter(help="Quantize MODEL by this recipe: a shipped one or a YAML file.")]
Recipes = Annotated[
    list[str],
    Parameter(negative=(), help="Quantize MODEL by this recipe, shipped or a YAML file; may be repeated."),
]
Candidates = Annotated[
    list[str],
    Parameter(
        negative=(),
        help="Another model with the same vocabulary, such as a quantized folder; may be repeated.",
    ),
]
Controls = Annotated[bool, Parameter(help="Add the controls of recipes with replication.")]
Windows = Annotated[Count, Parameter(help="How many windows of the text to measure, evenly spaced.")]
Window = Annotated[Count, Parameter(help="Tokens in a window.")]
Seed = Annotated[
    int,
    Parameter(
        validator=Number(gte=0, lt=2**63),
        converter=_integer,
        help="Seed of everything that is drawn at random.",
    ),
]
SeedOrNonce = Annotated[
    int | Literal["nonce"],
    Parameter(
        converter=_seed_or_nonce,
        help='A number, or the word "nonce": the seed of each request follows from its nonce.',
    ),
]
UnusedSeed = Annotated[Seed, Parameter(help="Has no effect: nothing is drawn at random.")]
Device = Annotated[
    str,
    Parameter(
        validator=_is_device,
        help="Where to run: cpu, cuda, cuda:1 or mps; auto: the first accelerator that works, else the CPU.",
    ),
]
Alpha = Annotated[
    float,
    Parameter(validator=_is_fraction, help="False-positive rate: how often an honest run may be refused."),
]

Budget = Annotated[float, Parameter(validator=_is_fraction)]


@cache
def chosen_device(name: str) -> str:
    """Return which device a name means here; what "auto" means is said on stderr. Raises as `as_device`."""
    from bitassay.models.options import AUTO, as_device

    device = str(as_device(name))
    if name == AUTO:
        print(f"device: {device}", file=sys.stderr)
    return device


@dataclass_transform(frozen_default=True)
def group(options: type) -> Any:
    """Make a class of options a group that a verb can take as one parameter."""
    return Parameter(name="*")(dataclass(frozen=True)(options))


@group
class Revision:
    """Which version of MODEL is meant."""

    revision: str | None = None
    """Branch, tag or commit of a model on the Hugging Face hub. MODEL@REVISION says the same for any model.
    """

    def of(self, model: str) -> str:
        """Return `model` with the revision."""
        return model if self.revision is None else f"{model}@{self.revision}"


@group
class Loading(Revision):
    """How MODEL is found and loaded: the options of every verb that loads a model."""

    attention: str = "auto"
    """Attention of transformers: auto (sdpa where the model has it), sdpa, eager or another."""
    trust_remote_code: Flag = False
    """Run code that comes with the model."""

    def check(self) -> None:
        """Raise BitassayError for an attention that is unknown."""
        from bitassay.models.options import as_attention

        as_attention(self.attention)

    @property
    def options(self) -> dict[str, Any]:
        """Return the keywords that `bitassay.load` takes, checked."""
        self.check()
        return {"attention": self.attention, "trust_remote_code": self.trust_remote_code}


@group
class Compute(Loading):
    """How MODEL is loaded, in which arithmetic and on which device it runs."""

    dtype: Dtype = "float32"
    """Arithmetic, and the dtype of weights that are not quantized."""
    device: Device = "auto"

    def check(self) -> None:
        """Raise BitassayError for an unknown attention or device, MissingError for an absent device."""
        super().check()
        chosen_device(self.device)

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"dtype": self.dtype, "device": chosen_device(self.device)}

    def check_engine(self, engine: str, recipes: Sequence[str] | None = None) -> None:
        """Raise BitassayError for an engine that there is not, for a device or an attention, which are of
        transformers, and for recipes, which change models of transformers; MissingError where the engine is
        not installed."""
        if engine == "transformers":
            return
        from bitassay.engines.hosted import check_engine

        if self.attention != "auto":
            raise BitassayError(
                f"--attention {self.attention} is of transformers", f"leave it out with {engine}"
            )
        if recipes:
            raise BitassayError(
                f"--recipe changes a model of transformers, and {engine} reads files",
                "bitassay quantize writes one, which is then the MODEL",
            )
        check_engine(engine, device="cpu" if self.device == "auto" else self.device)

    def load_for(
        self, engine: str, model: str, *, tokens: int = 0, progress: "Progress"
    ) -> "PreTrainedModel":
        """Load `model` for another engine than transformers, once `check_engine` is content. More `tokens`
        than it has positions are refused before it is loaded."""
        from bitassay.engines.load import load
        from bitassay.quantization.export.fits import check_fit

        trust = self.trust_remote_code
        check_fit(model, tokens=tokens, trust_remote_code=trust, progress=progress)
        return load(model, engine=engine, trust_remote_code=trust, progress=progress)

    def load(
        self,
        model: str,
        recipe: str | None = None,
        *,
        tokens: int = 0,
        engine: str = "transformers",
        progress: "Progress",
    ) -> "PreTrainedModel":
        """Load `model` for `engine`, and quantize it by `recipe` where one is named.

        What does not fit the model is refused before weights are read: a recipe for other modules, more
        `tokens` than it has positions.
        """
        if engine != "transformers":
            return self.load_for(engine, self.of(model), tokens=tokens, progress=progress)
        from bitassay.engines.load import load
        from bitassay.quantization.export.fits import check_fit
        from bitassay.quantization.pipeline import quantize_cached
        from bitassay.quantization.recipe.recipe import find_recipe

        name, recipes = self.of(model), [find_recipe(recipe)] if recipe else []
        check_fit(name, recipes, tokens=tokens, trust_remote_code=self.trust_remote_code, progress=progress)
        loaded = load(name, progress=progress, **self.options)
        return quantize_cached(loaded, recipes[0], progress=progress) if recipes else loaded


@group
class Bounded(Compute):
    """How MODEL is loaded, in which arithmetic it runs, and in how much memory."""

    memory: Memory | None = None
    """Host memory to work in, such as 16GB. A model that does not fit is read a layer at a time; what cannot
    be done in it is refused (default: what is free)."""


@group
class Compute16(Compute):
    """The same, in 16 bits."""

    dtype: Dtype = "bfloat16"
    """Arithmetic, and the dtype of weights that are not quantized."""


@group
class Verifiable(Compute16):
    """How a prover or a verifier runs MODEL. Traces hold states in these dtypes alone."""

    dtype: StateDtype = "bfloat16"
    """Arithmetic, and the dtype of the states in a trace."""


@group
class Machines:
    """Machines and processes of a study."""

    devices: Names | None = None
    """The machine of same-hardware studies, and the other one: cpu, cuda:0, mps; numerics may follow, as in
    cpu+avx2+eager+1thread (default: the devices of this computer; a CPU without another device uses other
    vector instructions as the other hardware)."""
    precision: Precision | None = None
    """Precision of the dense model, and of the quantized sides (default: fp16 as in the VeriLLM experiments;
    bf16 where a machine is a CPU, which computes fp16 many times slower; task3 and replication: bf16)."""
    jobs: Count | None = None
    """Processes at a time (default: 1, since more disturb the timings; task3 and replication: one for each
    core, as far as memory allows)."""
    gpus: Numbers | None = None
    """GPUs that the processes are distributed over."""


@group
class ProvenSampling:
    """How tokens are chosen, in a way that a verifier can check."""

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the most likely tokens that have this probability together."""
    seed: SeedOrNonce = 0

    @property
    def sampler(self) -> "Sampler":
        """Return the sampler. Raises BitassayError for values outside its range."""
        return _sampler(self.temperature, self.top_p, self.seed)


@group
class Sampling(ProvenSampling):
    """How tokens are chosen where there are no requests with a nonce of their own."""

    seed: Seed = 0


@group
class AskedSampling:
    """How tokens were to be chosen. What is not given is not checked where none of these is given, else it
    has the default of `bitassay prove`."""

    sampler: Literal["greedy", "gumbel-max"] | None = None
    """greedy takes the most likely token, gumbel-max samples."""
    temperature: float | None = None
    """The temperature that was asked for."""
    top_p: float | None = None
    """The nucleus that was asked for."""
    seed: SeedOrNonce | None = None
    """The seed that was asked for; "nonce" needs --nonce."""

    @property
    def asked(self) -> "Sampler | None":
        """Return the sampler that was asked for; None where none was named. Raises BitassayError for values
        outside its range, or that contradict each other."""
        if all(each is None for each in (self.sampler, self.temperature, self.top_p, self.seed)):
            return None
        given = ProvenSampling()
        temperature = given.temperature if self.temperature is None else self.temperature
        top_p = given.top_p if self.top_p is None else self.top_p
        asked = _sampler(temperature, top_p, self.seed or given.seed)
        if self.sampler not in (None, asked.name):
            raise BitassayError(
                f"--sampler {self.sampler} at temperature {temperature:g} is a contradiction",
                "greedy is temperature 0; gumbel-max needs a --temperature above 0",
            )
        return asked


def _sampler(temperature: float, top_p: float, seed: int | Literal["nonce"]) -> "Sampler":
    from bitassay.engines.sampling import NonceSampler, Sampler

    if seed != "nonce":
        return Sampler(temperature, top_p, seed)
    return NonceSampler(temperature, top_p) if temperature else Sampler(temperature, top_p)


@group
class Output:
    """How results are printed."""

    format: Format = "table"
    """What to print on stdout; json has everything."""

    def emit(self, *tables: Table, csv: Table | None = None, json: dict[str, Any] | None = None) -> None:
        """Print `tables`; as CSV only `csv` (default: the first), as JSON only `json` (default: the rows of
        the first)."""
        print_tables(tables, self.format, csv=csv, json=json)

    def emit_run(self, run: dict[str, Any]) -> None:
        """Print the tables of a run of any kind."""
        from bitassay.report.pages import page_of

        page = page_of(run)
        self.emit(*page.printed, csv=page.csv, json=run)


@group
class RunOutput(Output):
    """How results are printed, and where the run folder is."""

    out: Path | None = None
    """Run folder, which gets run.json and report.html (default: runs/NAME-ID)."""

    def show_run(self, run: dict[str, Any], folder: Path) -> None:
        """Write the page of a finished run into its folder, print its tables, and name the page on stderr."""
        from bitassay.report.pages import write_report

        write_report(run, folder / "report.html")
        self.emit_run(run)
        print(f"report: {folder / 'report.html'}", file=sys.stderr)

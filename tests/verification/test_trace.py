"""Everything that can be wrong with a trace: each defect is a named error or a FAIL, none a crash, none a
PASS."""

import json
import os
import random
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bitassay.engines.sampling import GREEDY, Sampler
from bitassay.errors import BitassayError
from bitassay.verification.trace import Header, Trace, TraceError, read_trace, write_trace
from bitassay.verification.verify import failed, verify

TOKENS = 12


def parts(trace, tmp_path):
    """The safetensors entries, the trace's header as plain JSON, and the tensors' bytes."""
    path = tmp_path / "parts"
    write_trace(path, trace)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + size])
    return entries, json.loads(entries.pop("__metadata__")["bitassay"]), data[8 + size :]


def assemble(entries, header, body, raw_header=None):
    """A trace file from its parts, however wrong they are."""
    metadata = {"bitassay": raw_header if raw_header is not None else json.dumps(header)}
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    return struct.pack("<Q", len(text)) + text + body


def with_header(**changes):
    """A defect: header fields changed; `part__field` reaches into a part."""

    def make(trace, tmp_path, honest):
        entries, header, body = parts(trace, tmp_path)
        for key, value in changes.items():
            *outer, last = key.split("__")
            target = header
            for name in outer:
                target = target[name]
            target[last] = value(target[last]) if callable(value) else value
        return assemble(entries, header, body)

    return make


def with_states(change):
    """A defect: the states replaced by `change(states)`; the header fits them in dtype and shape."""

    def make(trace, tmp_path, honest):
        return Trace(trace.header, {layer: change(rows.clone()) for layer, rows in trace.states.items()})

    return make


def with_entries(change):
    """A defect: the safetensors entries changed by `change(entries, body)`, which returns what the file
    holds."""

    def make(trace, tmp_path, honest):
        entries, header, body = parts(trace, tmp_path)
        entries, body = change(entries, body)
        return assemble(entries, header, body)

    return make


def cut(count):
    return lambda trace, tmp_path, honest: assemble(*parts(trace, tmp_path))[:count]


def drop_layer(trace, tmp_path, honest):
    entries, header, body = parts(trace, tmp_path)
    del entries["layer.16"]
    return assemble(entries, header, body)


def fewer_layers(trace, tmp_path, honest):
    states = {layer: rows for layer, rows in trace.states.items() if layer != 16}
    return Trace(trace.header.model_copy(update={"layers": tuple(states)}), states)


def more_layers(trace, tmp_path, honest):
    states = {4: trace.states[8], **trace.states}
    return Trace(trace.header.model_copy(update={"layers": tuple(states)}), states)


def undeclared_layer(trace, tmp_path, honest):
    tensors = {f"layer.{layer}": rows for layer, rows in trace.states.items()} | {
        "layer.4": trace.states[8].clone()
    }
    return safetensors.torch.save(tensors, {"bitassay": trace.header.model_dump_json()})


def layers_swapped(trace, tmp_path, honest):
    return Trace(trace.header, {8: trace.states[17], 16: trace.states[16], 17: trace.states[8]})


def layers_in_another_order(trace, tmp_path, honest):
    return Trace(trace.header.model_copy(update={"layers": (17, 16, 8)}), trace.states)


def fewer_positions(trace, tmp_path, honest):
    header = trace.header.model_copy(update={"positions": trace.header.positions[:-1]})
    return Trace(header, {layer: rows[:-1] for layer, rows in trace.states.items()})


def more_positions(trace, tmp_path, honest):
    header = trace.header.model_copy(
        update={"positions": (*trace.header.positions, len(trace.header.positions))}
    )
    return Trace(header, {layer: torch.cat([rows, rows[-1:]]) for layer, rows in trace.states.items()})


def last_position_twice(trace, tmp_path, honest):
    return Trace(
        trace.header.model_copy(
            update={"positions": (*trace.header.positions[:-1], trace.header.positions[-2])}
        ),
        trace.states,
    )


def positions_renamed(trace, tmp_path, honest):
    order = list(trace.header.positions)
    random.Random(0).shuffle(order)
    return Trace(trace.header.model_copy(update={"positions": tuple(order)}), trace.states)


def narrower(trace, tmp_path, honest):
    return Trace(trace.header, {layer: rows[:, :64].contiguous() for layer, rows in trace.states.items()})


def other_dtype(trace, tmp_path, honest):
    return Trace(trace.header, {layer: rows.float() for layer, rows in trace.states.items()})


def unshaped(entries, body):
    return entries | {"layer.8": entries["layer.8"] | {"shape": [1, *entries["layer.8"]["shape"]]}}, body


def huge(entries, body):
    wrong = {"dtype": "BF16", "shape": [entries["layer.8"]["shape"][0], 65536], "data_offsets": [0, 2**60]}
    return entries | {"layer.8": wrong}, body


def overlapping(entries, body):
    return entries | {"layer.8": entries["layer.16"]}, body


def negative(entries, body):
    return entries | {"layer.8": entries["layer.8"] | {"data_offsets": [-8, 0]}}, body


def not_an_entry(entries, body):
    return entries | {"layer.8": "states"}, body


def surprising_field(entries, body):
    return entries | {"layer.8": entries["layer.8"] | {"compressed": True}}, body


def nan_position(rows):
    rows[3, 5] = torch.nan
    return rows


def infinite_position(rows):
    rows[-1, 0] = torch.inf
    return rows


def shuffled(rows):
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def noise(rows):
    return (torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)) * rows.float().std()).to(
        rows.dtype
    )


def tokens_swapped(trace, tmp_path, honest):
    output = list(trace.header.output_ids)
    i = next(i for i in range(len(output) - 1) if output[i] != output[i + 1])
    output[i], output[i + 1] = output[i + 1], output[i]
    return Trace(trace.header.model_copy(update={"output_ids": tuple(output)}), trace.states)


def another_token(trace, tmp_path, honest):
    output = (*trace.header.output_ids[:-1], (trace.header.output_ids[-1] + 7) % 500 + 3)
    return Trace(trace.header.model_copy(update={"output_ids": output}), trace.states)


def another_prompt(trace, tmp_path, honest):
    prompt = (*trace.header.prompt_ids[:-1], trace.header.prompt_ids[-1] % 500 + 3)
    return Trace(trace.header.model_copy(update={"prompt_ids": prompt}), trace.states)


def replayed(trace, tmp_path, honest):
    return next(one for one in honest if one.header.nonce != trace.header.nonce and one.n_tokens == TOKENS)


def stopped_early(trace, tmp_path, honest):
    count = trace.n_prompt + 8
    header = trace.header.model_copy(
        update={"output_ids": trace.header.output_ids[:9], "positions": tuple(range(count))}
    )
    return Trace(header, {layer: rows[:count] for layer, rows in trace.states.items()})


def end_in_the_middle(trace, tmp_path, honest):
    return Trace(
        trace.header.model_copy(update={"output_ids": (2, *trace.header.output_ids[1:])}), trace.states
    )


def duplicate_header_key(trace, tmp_path, honest):
    entries, header, body = parts(trace, tmp_path)
    return assemble(entries, header, body, json.dumps(header)[:-1] + ', "nonce": "x"}')


def duplicate_tensor(trace, tmp_path, honest):
    entries, header, body = parts(trace, tmp_path)
    text = json.dumps({"__metadata__": {"bitassay": json.dumps(header)}, **entries})
    text = (text[:-1] + ', "layer.8": ' + json.dumps(entries["layer.8"]) + "}").encode()
    return struct.pack("<Q", len(text)) + text + body


def raw_header(text):
    def make(trace, tmp_path, honest):
        entries, header, body = parts(trace, tmp_path)
        return assemble(entries, header, body, text(header) if callable(text) else text)

    return make


def plain_safetensors(trace, tmp_path, honest):
    return safetensors.torch.save({"layer.8": torch.zeros(2, 2)})


def directory(trace, tmp_path, honest):
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def pipe(trace, tmp_path, honest):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


DIGEST = "0" * 64
DEFECTS = {
    # the file
    "empty file": (cut(0), "truncated"),
    "seven bytes": (cut(7), "truncated"),
    "cut in the header": (cut(100), "truncated"),
    "cut in the states": (cut(-1), "truncated"),
    "bytes after the end": (lambda t, p, h: assemble(*parts(t, p)) + b"\0", "trailing-bytes"),
    "header longer than the file": (lambda *_: struct.pack("<Q", 10**6) + b"{}", "truncated"),
    "header of an exabyte": (lambda *_: struct.pack("<Q", 2**60) + b"{}", "header-oversize"),
    "header length with the sign bit": (lambda *_: b"\xff" * 16, "header-oversize"),
    "garbage": (lambda *_: struct.pack("<Q", 64) + bytes(range(128, 192)), "header-malformed"),
    "JSON that is no object": (lambda *_: struct.pack("<Q", 2) + b"[]", "not-a-trace"),
    "deeply nested JSON": (lambda *_: struct.pack("<Q", 10**6) + b"[" * 10**6, "header-malformed"),
    "a number of a million digits": (lambda *_: struct.pack("<Q", 10**6) + b"1" * 10**6, "header-malformed"),
    "text file": (lambda *_: b"this is not a trace, it is a sentence", "header-oversize"),
    "pickle": (lambda *_: b"\x80\x04K\x01.", "truncated"),
    "another safetensors file": (plain_safetensors, "not-a-trace"),
    "directory": (directory, "not-a-file"),
    "named pipe": (pipe, "not-a-file"),
    # the tensors
    "missing tensor": (drop_layer, "missing-layer"),
    "undeclared tensor": (undeclared_layer, "extra-layer"),
    "tensor twice": (duplicate_tensor, "duplicate-key"),
    "three dimensions": (with_entries(unshaped), "wrong-shape"),
    "huge declared tensor": (with_entries(huge), "wrong-shape"),
    "overlapping tensors": (with_entries(overlapping), "wrong-offsets"),
    "negative offsets": (with_entries(negative), "malformed"),
    "entry that is no object": (with_entries(not_an_entry), "malformed"),
    "entry with a field too many": (with_entries(surprising_field), "malformed"),
    "wrong dtype": (other_dtype, "wrong-dtype"),
    "NaN": (with_states(nan_position), "not-finite"),
    "infinity": (with_states(infinite_position), "not-finite"),
    # the header
    "header is not JSON": (raw_header("{"), "header-malformed"),
    "header has NaN": (raw_header('{"schema_version": NaN}'), "header-malformed"),
    "header is a list": (raw_header("[]"), "header-field"),
    "header key twice": (duplicate_header_key, "duplicate-key"),
    "other schema version": (with_header(schema_version=2), "schema-version"),
    "schema version as text": (with_header(schema_version="1"), "schema-version"),
    "unknown field": (raw_header(lambda header: json.dumps(header | {"verdict": "PASS"})), "header-field"),
    "missing field": (
        raw_header(lambda h: json.dumps({k: v for k, v in h.items() if k != "nonce"})),
        "header-field",
    ),
    "negative token id": (with_header(output_ids=lambda ids: [-1, *ids[1:]]), "header-field"),
    "token id of 2^63": (with_header(prompt_ids=lambda ids: [2**63, *ids[1:]]), "header-field"),
    "token id as text": (with_header(prompt_ids=lambda ids: ["1", *ids[1:]]), "header-field"),
    "token id as a boolean": (with_header(prompt_ids=lambda ids: [True, *ids[1:]]), "header-field"),
    "no prompt": (with_header(prompt_ids=[]), "header-field"),
    "no output": (with_header(output_ids=[]), "header-field"),
    "no layers": (with_header(layers=[]), "header-field"),
    "layer twice": (with_header(layers=[8, 8, 16, 17]), "duplicate-layer"),
    "digest that is none": (with_header(model__weights_digest="x"), "header-field"),
    "nonce with a line break": (with_header(nonce="a\n"), "header-field"),
    "nonce of a megabyte": (with_header(nonce="a" * 10**6), "header-field"),
    "sampler that contradicts itself": (with_header(sampling__temperature=0.7), "header-field"),
    "temperature of a million": (with_header(sampling__temperature=1e6), "header-field"),
    # against the verifier's model
    "token id beyond the vocabulary": (
        with_header(output_ids=lambda ids: [512, *ids[1:]]),
        "token-outside-vocabulary",
    ),
    "fewer layers": (fewer_layers, "missing-layer"),
    "more layers": (more_layers, "wrong-layers"),
    "layers in another order": (layers_in_another_order, "wrong-layers"),
    "missing position": (fewer_positions, "missing-position"),
    "extra position": (more_positions, "wrong-positions"),
    "position twice": (last_position_twice, "wrong-positions"),
    "positions renamed": (positions_renamed, "wrong-positions"),
    "narrower states": (narrower, "wrong-hidden-size"),
    "other weights": (with_header(model__weights_digest=DIGEST), "other-weights"),
    "other tokenizer": (with_header(model__tokenizer_digest=DIGEST), "other-tokenizer"),
    "other recipe": (with_header(model__recipe_id=DIGEST), "other-recipe"),
    "other configuration": (with_header(model__config_digest=DIGEST), "other-configuration"),
    # against the request
    "other prompt claimed": (another_prompt, "other-prompt"),
    "other nonce": (with_header(nonce="old"), "other-nonce"),
    "replay of another request": (replayed, "other-nonce"),
    "sampled, not greedy": (
        with_header(sampling__sampler="gumbel-max", sampling__temperature=1.0),
        "other-sampler",
    ),
    "shorter than asked": (with_header(sampling__max_new_tokens=3), "other-length"),
    "more tokens than declared": (with_header(sampling__max_new_tokens=3), "too-many-tokens"),
    "stopped early": (stopped_early, "stopped-early"),
    "padded after the end": (end_in_the_middle, "tokens-after-end"),
    # what only the statistics can see
    "tokens swapped": (tokens_swapped, "tokens-unlikely"),
    "one token altered": (another_token, "tokens-unlikely"),
    "zero states": (with_states(torch.zeros_like), "states-too-far"),
    "random states": (with_states(noise), "states-too-far"),
    "states of other positions": (with_states(lambda rows: rows.roll(1, 0)), "states-too-far"),
    "one state copied everywhere": (
        with_states(lambda rows: rows[-1:].expand_as(rows).contiguous()),
        "states-too-far",
    ),
    "states shuffled": (with_states(shuffled), "states-too-far"),
    "layers swapped": (layers_swapped, "states-too-far"),
    "states a little too large": (with_states(lambda rows: rows * 1.1), "states-too-far"),
    "states negated": (with_states(lambda rows: -rows), "states-too-far"),
}


def verdict_on(made, trace, model, profile, tmp_path):
    """What `bitassay verify` would say about a file, an object or a path."""
    path = made if isinstance(made, Path) else tmp_path / "made.trace"
    if isinstance(made, bytes):
        path.write_bytes(made)
    elif isinstance(made, Trace):
        write_trace(path, made)
    request = {
        "expected_prompt": trace.header.prompt_ids,
        "expected_nonce": trace.header.nonce,
        "expected_sampler": GREEDY,
        "expected_max_new_tokens": TOKENS,
    }
    try:
        return verify(read_trace(path), model, profile=profile, **request)
    except TraceError as error:
        return failed(error, "model")


def test_the_honest_trace_passes(trace, model, profile, tmp_path):
    assert verdict_on(trace, trace, model, profile, tmp_path).status == "PASS"
    entries, header, body = parts(trace, tmp_path)
    assert verdict_on(assemble(entries, header, body), trace, model, profile, tmp_path).status == "PASS"


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_fails_with_its_name(name, trace, honest, model, profile, tmp_path):
    make, code = DEFECTS[name]
    verdict = verdict_on(make(trace, tmp_path, honest), trace, model, profile, tmp_path)
    assert verdict.status == "FAIL"
    assert code in [reason.code for reason in verdict.reasons]
    assert json.dumps(verdict.to_dict(), allow_nan=False)
    assert len(str(verdict)) < 2000


@pytest.mark.parametrize("name", [name for name, (_, code) in DEFECTS.items() if code not in ("not-a-file",)])
def test_a_defect_in_memory_fails_as_well(name, trace, honest, model, profile, tmp_path):
    made = DEFECTS[name][0](trace, tmp_path, honest)
    if isinstance(made, Trace):
        assert (
            verify(
                made,
                model,
                profile=profile,
                expected_nonce=trace.header.nonce,
                expected_prompt=trace.header.prompt_ids,
            ).status
            == "FAIL"
        )


def test_random_damage_never_passes_and_never_crashes(trace, model, profile, tmp_path):
    """One byte of the header changed, anywhere: an error, a FAIL, or a field that says nothing about what ran
    (the name, a version)."""
    entries, header, body = parts(trace, tmp_path)
    data = assemble(entries, header, body)
    size = struct.unpack("<Q", data[:8])[0]
    choose = random.Random(1)
    for _ in range(150):
        at = choose.randrange(8 + size)
        damaged = data[:at] + bytes([choose.randrange(256)]) + data[at + 1 :]
        verdict = verdict_on(damaged, trace, model, profile, tmp_path)
        if verdict.status == "PASS":
            read = read_trace(tmp_path / "made.trace").header
            assert (
                read.model_copy(update={"model": trace.header.model, "sampling": trace.header.sampling})
                == trace.header
            )
            assert read.model.model_copy(update={"name": trace.header.model.name}) == trace.header.model


def test_what_is_written_is_read(trace, sampled, tmp_path):
    for one in (trace, sampled):
        write_trace(tmp_path / "x.trace", one)
        back = read_trace(tmp_path / "x.trace")
        assert back.header == one.header
        assert back.states.keys() == one.states.keys()
        assert all(torch.equal(back.states[layer], one.states[layer]) for layer in one.states)


def test_a_missing_file_is_no_verdict(tmp_path):
    with pytest.raises(BitassayError, match=r"none\.trace") as raised:
        read_trace(tmp_path / "none.trace")
    assert not isinstance(raised.value, TraceError)


def test_header_is_frozen(trace):
    with pytest.raises(ValueError, match="frozen"):
        trace.header.nonce = "x"
    assert isinstance(trace.header, Header)


def test_a_trace_in_memory_with_a_forged_header_object_fails(trace, model, profile):
    for change in (
        {"output_ids": (-5,) * TOKENS},
        {"prompt_ids": ()},
        {"sampling": None},
        {"schema_version": 9},
    ):
        forged = Trace(trace.header.model_copy(update=change), trace.states)
        assert verify(forged, model, profile=profile).status == "FAIL"


def test_seeded_sampling_is_checked(sampled, model):
    """Without a profile for sampling there is no verdict, but the rebuilt noise shows whose tokens they
    are."""
    honest = verify(sampled, model)
    assert honest.status == "INCONCLUSIVE"
    sampling = sampled.header.sampling.model_copy(update={"seed": 6})
    other = verify(Trace(sampled.header.model_copy(update={"sampling": sampling}), sampled.states), model)
    assert honest.mean_margin < 0.05 < other.mean_margin
    assert verify(sampled, model, expected_sampler=Sampler(0.9, 0.95, 6)).status == "FAIL"
    assert verify(sampled, model, expected_sampler=Sampler(0.9, 0.95, 5)).status == "INCONCLUSIVE"

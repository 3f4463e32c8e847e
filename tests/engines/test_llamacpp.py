"""The engine llama.cpp against transformers on the same file."""

import pytest
import torch

import bitassay
from bitassay.engines import llamacpp_library
from bitassay.engines.engine import engine_of
from bitassay.engines.sampling import Draw, Sampler
from bitassay.errors import BitassayError, MissingError
from bitassay.quantization.export.gguf_file import write_gguf
from bitassay.verification.numerics import numerics

TEXT = "Once upon a time there was a little girl named Lily. She loved to play"
OUTPUT = [300, 12, 44]


def test_without_the_package_it_is_missing(monkeypatch):
    llamacpp_library.bindings.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(MissingError, match="needs llama-cpp-python"):
        bitassay.load("stories260k", engine="llama.cpp")
    llamacpp_library.bindings.cache_clear()


@pytest.fixture(scope="module")
def files(stories, tmp_path_factory):
    """The model in 16 bits, and rounded to Q4_0."""
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITASSAY_CACHE", str(folder / "cache"))
        recipe = {"name": "q4", "weights": {"format": "int4", "granularity": "g32"}}
        q4 = bitassay.quantize(stories, bitassay.Recipe.model_validate(recipe))
        for name, model in (("f16", stories), ("q4", q4)):
            write_gguf(model, folder / f"{name}.gguf")
        yield folder


@pytest.fixture(scope="module", params=["f16", "q4"])
def pair(request, files):
    """The same file in llama.cpp and in transformers."""
    path = files / f"{request.param}.gguf"
    return bitassay.load(path, engine="llama.cpp"), bitassay.load(path)


def ids_of(model):
    return engine_of(model).encode(TEXT)


def relative(x, y):
    assert x.shape == y.shape
    return ((x - y).norm(dim=-1) / y.norm(dim=-1)).mean().item()


def test_it_generates_as_transformers_does_with_the_same_states(pair):
    hosted, ours = pair
    asked = {"max_new_tokens": 12, "layers": (1, 3, 5)}
    (there,) = engine_of(hosted).generate([ids_of(hosted)], **asked)
    (here,) = engine_of(ours).generate([ids_of(ours)], **asked)
    assert there.output_ids == here.output_ids
    for layer in asked["layers"]:
        assert relative(there.states[layer], here.states[layer]) < 0.02
    assert relative(there.states[5], here.states[3]) > 0.1  # a bound that another layer does not keep


def test_what_it_reads_does_not_depend_on_pieces_and_taps(pair, monkeypatch):
    hosted, ours = pair
    text = [ids_of(hosted)], [OUTPUT]
    (there,), (here,) = (engine_of(model).prefill(*text, layers=(2, 5)) for model in pair)
    assert there.logits.shape == here.logits.shape == (3, 512)
    assert all(relative(there.states[layer], here.states[layer]) < 0.02 for layer in (2, 5))
    (plain,) = engine_of(hosted).prefill(*text)
    assert (there.logits - plain.logits).abs().max() < 0.05
    (logprobs,) = engine_of(hosted).logprobs(*text)
    assert logprobs.dtype == torch.float64
    torch.testing.assert_close(logprobs, engine_of(ours).logprobs(*text)[0], atol=0.1, rtol=0)
    monkeypatch.setattr(llamacpp_library, "BATCH", 8)
    engine_of(hosted)._contexts.clear()
    (pieces,) = engine_of(hosted).prefill(*text, layers=(2, 5))
    assert (pieces.logits - there.logits).abs().max() < 0.05
    assert relative(pieces.states[5], there.states[5]) < 0.01
    engine_of(hosted)._contexts.clear()


def test_sampled_tokens_can_be_checked(pair):
    hosted, ours = pair
    sampler, ids = Sampler(temperature=1.0, top_p=0.9, seed=3), ids_of(hosted)
    (made,) = engine_of(hosted).generate([ids], max_new_tokens=12, sampler=sampler, nonces=["n"])
    assert made == engine_of(hosted).generate([ids], max_new_tokens=12, sampler=sampler, nonces=["n"])[0]
    (read,) = engine_of(ours).prefill([ids], [made.output_ids])
    draws = [Draw("n", index) for index in range(len(made.output_ids))]
    margins = sampler.margins(read.logits, torch.tensor(made.output_ids), draws)
    assert margins.mean() < 0.02
    other = sampler.margins(read.logits, torch.tensor(made.output_ids), [Draw("m", d.index) for d in draws])
    assert other.mean() > 0.5


def test_texts_that_are_timed_together_are_read_as_alone(pair):
    engine = engine_of(pair[0])
    prompts = [list(ids_of(pair[0])), [*ids_of(pair[0])[:-1], 300], [7] * len(ids_of(pair[0]))]
    alone = [engine.generate([prompt], max_new_tokens=3)[0].output_ids for prompt in prompts]
    context = llamacpp_library.Context(engine.library, 64, texts=3)
    found = [context.likeliest(prompts)]
    for _ in range(2):
        found.append(context.likeliest([[token] for token in found[-1]]))
    context.free()
    assert [tuple(row) for row in zip(*found, strict=True)] == alone
    assert min(engine.time(prompts, 2)) > 0
    assert "texts at most" in engine.impossible(10_000, 1, 1)
    assert engine.impossible(32, 1, 1) == ""


def test_it_stops_where_it_is_told_to(pair):
    engine = engine_of(pair[0])
    (made,) = engine.generate([ids_of(pair[0])], max_new_tokens=9, until=lambda output: len(output) == 4)
    assert len(made.output_ids) == 4


def test_a_trace_says_who_ran(pair):
    hosted, ours = pair
    trace = bitassay.prove(hosted, TEXT, max_new_tokens=8)
    assert trace.header.numerics == numerics(hosted)
    assert (trace.header.numerics.engine, trace.header.numerics.dtype) == ("llama.cpp", "float32")
    verdict = bitassay.verify(trace, ours, expected_prompt=TEXT)
    assert not verdict.structural
    assert 0 < verdict.hidden_distance < 0.02


def test_refusals(files, pair, tmp_path):
    hosted, _ = pair
    engine = engine_of(hosted)
    with pytest.raises(BitassayError, match="reads GGUF files, and this is a folder"):
        bitassay.load("stories260k", engine="llama.cpp")
    with pytest.raises(BitassayError, match="cannot go on from states"):
        engine.prefill([[1]], [[2]], claimed=[{1: torch.zeros(1, 64)}])
    with pytest.raises(BitassayError, match="no decoder layer 6"):
        engine.generate([[1]], max_new_tokens=1, layers=(6,))
    with pytest.raises(BitassayError, match="do not fit the model's 512 positions"):
        engine.generate([[1] * 500], max_new_tokens=20)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes((files / "f16.gguf").read_bytes())
    loaded = bitassay.load(damaged, engine="llama.cpp")  # its shapes are kept in the cache
    del loaded
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    with pytest.raises(BitassayError, match=r"llama\.cpp .* cannot load it"):
        llamacpp_library.Library(damaged, 1)

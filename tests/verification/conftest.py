"""A random Llama with 17 layers, so that three of them are sampled, its honest profile, and an honest
trace."""

import copy
import random

import pytest
import torch

from bitassay.engines.sampling import Sampler
from bitassay.testing.tiny import tiny_model
from bitassay.verification.calibrate import calibrate
from bitassay.verification.prove import prove_many
from bitassay.verification.receipts.challenge import challenge
from bitassay.verification.receipts.opening import open_trace
from bitassay.verification.receipts.receipt import commit
from bitassay.verification.verify import verify_many
from threads import one_thread  # noqa: F401 a fixture of this package
from verification.receipts import BEACON, KEY

TOKENS = 12


@pytest.fixture(scope="package", autouse=True)
def own_cache(tmp_path_factory):
    """No profile of the user's is found, and none is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITASSAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="package")
def prompts():
    """96 prompts of 4 to 11 random tokens."""
    choose = random.Random(0)
    return [[1, *(choose.randrange(3, 512) for _ in range(choose.randrange(3, 11)))] for _ in range(96)]


@pytest.fixture(scope="package")
def model():
    return tiny_model("llama", num_hidden_layers=17, initializer_range=0.1).to(torch.bfloat16)


@pytest.fixture(scope="package")
def profile(model, prompts):
    return calibrate(
        model, model, prompts[:56], max_new_tokens=TOKENS, min_positions=6, alpha=0.05, guarantee="average"
    )


@pytest.fixture(scope="package")
def honest(model, prompts):
    """Honest traces of 40 prompts that the profile has not seen."""
    return prove_many(model, prompts[56:], max_new_tokens=TOKENS, nonces=[f"n{index}" for index in range(40)])


@pytest.fixture(scope="package")
def trace(model, profile, honest):
    """An honest trace that passes with room to spare, and that has the full length."""
    verdicts = verify_many(honest, model, profile=profile)
    full = [index for index, one in enumerate(honest) if one.n_tokens == TOKENS]
    return honest[max(full, key=lambda index: verdicts[index].p_value)]


@pytest.fixture(scope="package")
def sampled(model, prompts):
    """An honest sampled trace."""
    return prove_many(model, prompts[:1], max_new_tokens=TOKENS, sampler=Sampler(0.9, 0.95, 5))[0]


@pytest.fixture(scope="package")
def receipt(trace):
    return commit(trace, KEY)


@pytest.fixture(scope="package")
def asked(receipt):
    """Opens 8 of 11 generated positions, and 3 of the prompt's."""
    return challenge(receipt, beacon=BEACON, generated=8, prompt=3)


@pytest.fixture(scope="package")
def opening(trace, asked):
    return open_trace(trace, asked)


@pytest.fixture(scope="session")
def round_weights():
    """A function (model, bits, group=None) -> a copy with the decoder layers' matrices rounded to `bits` bits
    per row, or per `group` input columns, symmetric absmax."""

    def rounded_copy(model, bits, group=None):
        rounded = copy.deepcopy(model)
        for name, weight in rounded.named_parameters():
            if weight.ndim == 2 and ".layers." in name:
                groups = weight.data.float().view(weight.shape[0], -1, group or weight.shape[1])
                scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
                weight.data = ((groups / scale).round() * scale).view_as(weight).to(weight.dtype)
        return rounded

    return rounded_copy

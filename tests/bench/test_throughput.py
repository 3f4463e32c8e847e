import copy
import time

import torch

from bitassay.bench.throughput import throughput


def test_a_slower_model_measures_slower_and_each_is_fully_timed(stories):
    prompt = torch.randint(3, 500, (40,))
    slowed = copy.deepcopy(stories)
    slowed.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    found = throughput({"plain": lambda: stories, "slow": lambda: slowed}, prompt, decode_tokens=4, repeats=2)
    slow = found["slow"]
    assert 4 / slow["decode_tok_s"] >= 4 * 0.05
    assert 40 / slow["prefill_tok_s"] >= 0.05
    assert found["plain"]["decode_tok_s"] > slow["decode_tok_s"]
    assert [slow[key] for key in ("prompt_tokens", "decode_tokens", "repeats")] == [40, 4, 2]

"""Engines of another package: transformers again, with weights that they read themselves."""

import time

import torch

from bitassay.engines import decode
from bitassay.engines.decode import Generation, end_tokens
from bitassay.engines.engine import TransformersEngine
from bitassay.engines.load import load
from bitassay.engines.one_by_one import OneByOneEngine
from bitassay.engines.sampling import Draw
from bitassay.models.identity import identity


class Other(TransformersEngine):
    """Runs the folder of a model that comes without weights."""

    def __init__(self, model):
        super().__init__(load(identity(model).source.folder))

    def numerics(self):
        return super().numerics() | {"engine": "other", "engine_version": "1"}


class Reader(OneByOneEngine):
    """Reads one text after the other, and says how long that takes; `read_ids` has the texts that it read."""

    title = "reader"

    def __init__(self, model):
        super().__init__(model)
        self.path, self.read_ids = identity(model).source.folder, []
        self.inner = load(self.path)

    def continued(self, prompt, nonce, max_new_tokens, sampler, layers, until):
        output = []
        while True:
            logits = self.inner(torch.tensor([[*prompt, *output]])).logits[0, -1:]
            output += sampler.choose(logits, [Draw(nonce, len(output))]).tolist()
            if output[-1] in end_tokens(self.model) or len(output) == max_new_tokens or until(output):
                return Generation(tuple(output), {})

    def read(self, text, outputs, layers):
        self.read_ids.append(tuple(text))
        cut = len(text) + 1 - outputs
        return decode.prefill(self.inner, [text[:cut]], [[*text[cut:], 0]], layers=layers)[0]

    def impossible(self, batch, prompt_tokens, new_tokens):
        return "" if batch == 1 else "the reader reads one text at a time"

    def time(self, prompts, new_tokens):
        start = time.perf_counter()
        self.inner(torch.tensor(prompts))
        return time.perf_counter() - start, 1.0 * new_tokens

    def numerics(self):
        return TransformersEngine(self.inner).numerics() | {"engine": "reader", "engine_version": "1"}

"""As much of vLLM's Python API as the engine uses, around a model of transformers."""

from types import SimpleNamespace

import torch

__version__ = "0.fake"
SamplingParams = SimpleNamespace


class Outer(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.cache = inner, None

    def forward(self, ids):
        return self.inner.model(torch.tensor([ids]), past_key_values=self.cache).last_hidden_state[0]

    def compute_logits(self, hidden):
        return self.inner.lm_head(hidden)


class Steps:
    """Requests that are read two a step, and then continued together."""

    def __init__(self, model, config):
        self.model, self.vllm_config, self.left, self.read = model, config, {}, []

    def add_request(self, name, prompt, sampling):
        assert name not in self.left
        self.left[name] = sampling.max_tokens

    def has_unfinished_requests(self):
        return bool(self.left)

    def step(self):
        self.read += [name for name in self.left if name not in self.read][:2]
        done = [name for name in self.read if name in self.left]
        for name in done:
            self.left[name] -= 1
            if not self.left[name]:
                del self.left[name]
        return [SimpleNamespace(request_id=name) for name in done]


class LLM:
    def __init__(self, folder, **options):
        if "refused" in folder:
            raise ValueError("no scheme was found\nmore about it")
        from transformers import AutoModelForCausalLM

        self.model = Outer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        model, cache = SimpleNamespace(dtype=torch.float32), SimpleNamespace(cache_dtype="auto")
        config = SimpleNamespace(model_config=model, cache_config=cache)
        self.llm_engine, self.limit = Steps(self.model, config), options["max_model_len"]

    def apply_model(self, function):
        return [function(self.model)]

    @torch.inference_mode()
    def generate(self, prompts, sampling, use_tqdm):
        from transformers import DynamicCache

        ((ids,),) = (prompt.values() for prompt in prompts)
        assert len(ids) + sampling.max_tokens <= self.limit
        self.model.cache, output = DynamicCache(), []
        while True:
            hidden = self.model(output[-1:] or ids)
            output.append(int(self.model.compute_logits(hidden[-1:]).argmax()))
            if output[-1] in sampling.stop_token_ids or len(output) == sampling.max_tokens:
                return

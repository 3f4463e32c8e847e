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


class LLM:
    def __init__(self, folder, **options):
        if "refused" in folder:
            raise ValueError("no scheme was found\nmore about it")
        from transformers import AutoModelForCausalLM

        self.model = Outer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        model, cache = SimpleNamespace(dtype=torch.float32), SimpleNamespace(cache_dtype="auto")
        config = SimpleNamespace(model_config=model, cache_config=cache)
        self.llm_engine, self.limit = SimpleNamespace(vllm_config=config), options["max_model_len"]

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

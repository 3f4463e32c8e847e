"""Prompts as token ids."""

from transformers import PreTrainedModel

from bitassay.engines.decode import TokenIds
from bitassay.models.identity import tokenizer


def encode_prompt(model: PreTrainedModel, prompt: str | TokenIds) -> tuple[int, ...]:
    """Return the token ids of a prompt: text as one user message in the chat template, or as it is where
    there is none."""
    if not isinstance(prompt, str):
        return tuple(int(token) for token in prompt)
    tokens = tokenizer(model)
    if getattr(tokens, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        return tuple(tokens.apply_chat_template(message, add_generation_prompt=True, return_dict=False))  # type: ignore[arg-type]
    return tuple(tokens(prompt).input_ids)

"""Files as llama.cpp's own converter writes them: does bitassay read the model that was converted?

A tiny model with random weights of every kind that is read is saved, converted and read again; printed is the
largest difference between the logits of the two. A model that is refused is printed with the reason.

Run: python benchmarks/gguf_reading.py LLAMA_CPP, the folder of llama.cpp's source (with conversion/).
"""

import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import bitassay
from bitassay.errors import BitassayError

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
THETA = {"rope_theta": 1e4}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = THETA | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = THETA | {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [2.0 + 0.3 * index for index in range(8)],
    "original_max_position_embeddings": 64,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TIED, WINDOW = {"tie_word_embeddings": True}, {"sliding_window": 32, "query_pre_attn_scalar": 16}
KINDS = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", TIED),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, yarn, betas": ("llama", {"rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}}),
    "llama, yarn, own scale": ("llama", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "llama, linear": ("llama", {"rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3, tied, biases": ("qwen3", TIED | {"attention_bias": True}),
    "qwen2_moe": ("qwen2_moe", FEW | {"shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", FEW | {"norm_topk_prob": True}),
    "phi3": ("phi3", {"sliding_window": 64, "original_max_position_embeddings": 256}),
    "phi3, longrope": (
        "phi3",
        {"sliding_window": None, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
    ),
    "phi3, partial": (
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 256,
            "rope_parameters": THETA | {"rope_type": "default", "partial_rotary_factor": 0.5},
        },
    ),
    "gemma": ("gemma", TIED),
    "gemma2": ("gemma2", TIED | WINDOW),
    "gemma3": ("gemma3_text", TIED | WINDOW),
    "gemma3, linear": ("gemma3_text", TIED | WINDOW | {"rope_parameters": GEMMA3_ROPE}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "smollm3": ("smollm3", {}),
    "arcee": ("arcee", {}),
    "seed_oss": ("seed_oss", {"attention_bias": True}),
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", TIED | {"logit_scale": 0.25}),
    "nemotron": ("nemotron", {"partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", {"use_bias": True}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.25}),
}


def save(folder: Path, kind: str, changes: dict) -> None:
    """A model with random weights, biases and norms, and a tokenizer of its size."""
    # Gemma 3's converter leaves out the rows of the embedding for which the tokenizer has no token.
    given = SHAPE | changes | ({"vocab_size": 281} if kind == "gemma3_text" else {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"] - 20,  # transformers adds tokens to some kinds
        special_tokens=["<|end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator([a + b for a in "abcdefgh" for b in "abcdefgh"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=learner, eos_token="<|end|>").save_pretrained(folder)


def convert(folder: Path, out: Path) -> None:
    """What `convert_hf_to_gguf.py --outtype f32` does, but for the tokenizer, which it would not know."""
    import conversion.base as base  # pyright: ignore[reportMissingImports]
    import gguf
    from conversion import get_model_class  # pyright: ignore[reportMissingImports]

    config = base.ModelBase.load_hparams(folder, False)
    converter = get_model_class(config["architectures"][0])
    with (
        patch.object(converter, "set_vocab", lambda self: self._set_vocab_gpt2()),
        patch.object(base.TextModel, "get_vocab_base_pre", lambda self, tokenizer: "gpt-2"),
    ):
        converter(folder, gguf.LlamaFileType.ALL_F32, out, hparams=config).write()


def main(llama_cpp: str) -> None:
    sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]
    tokens = torch.randint(3, 280, (2, 200), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as scratch:
        for name, (kind, changes) in KINDS.items():
            folder = Path(scratch, name.replace(", ", "-"))
            save(folder, kind, changes)
            convert(folder, folder.with_suffix(".gguf"))
            right = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
            try:
                got = bitassay.load(folder.with_suffix(".gguf"), attention="eager")
            except BitassayError as error:
                print(f"| {name} | refused | {error.problem.split('.gguf: ')[-1]} |")
                continue
            with torch.inference_mode():
                far = (right(tokens).logits - got(tokens).logits).abs().max().item()
            print(f"| {name} | {type(got).__name__} | {far:.1e} |")


if __name__ == "__main__":
    main(sys.argv[1])

"""Perplexity of GGUF files in llama.cpp, run with a Python that has llama-cpp-python (and not bitassay).

stdin: {"files": [...], "windows": [[token, ...], ...], "text": "..."}. stdout: for each file the mean
negative log-likelihood of each window, and the tokens that its tokenizer makes of the text.
"""

import json
import sys

import llama_cpp
import numpy as np


def window_nll(model: llama_cpp.Llama, window: list[int]) -> float:
    model.reset()
    model.eval(window)
    logits = np.array(model.scores[: len(window) - 1], dtype=np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(-log_probabilities[np.arange(len(window) - 1), window[1:]].mean())


job = json.load(sys.stdin)
length = max(len(window) for window in job["windows"])
answer = {"version": llama_cpp.__version__, "files": {}}
for file in job["files"]:
    model = llama_cpp.Llama(file, n_ctx=length, n_batch=length, n_threads=1, logits_all=True, verbose=False)
    answer["files"][file] = {
        "nll": [window_nll(model, window) for window in job["windows"]],
        "tokens": model.tokenize(job["text"].encode(), add_bos=False, special=False),
    }
    model.close()
json.dump(answer, sys.stdout)

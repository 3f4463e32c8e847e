"""A small invented run.json of every kind that has a page."""

from report.example import RUN

MODEL = {"name": "toy", "origin": "bundled", "weights_digest": "d" * 64}
HEAD = {"schema_version": 2, "run_id": "0123456789ab", "created": "2026-01-01T00:00:00+00:00", "model": MODEL}
HEAD |= {"settings": {}, "interval": "95 %", "intervals": {}}
ENVIRONMENT = {"threads": 2, "cores": 4, "cpu": "a processor", "cuda": None, "load": [0.5, 0.25, 0.1]}


def timed(model: str, kind: str, batch: int, tokens: int, **more) -> dict:
    return {
        "model": model,
        "kind": kind,
        "batch": batch,
        "prompt_tokens": tokens,
        "new_tokens": 4,
        "ttft_s": 0.031,
        "prefill_tok_s": 1234.5,
        "prefill_samples_s": 2.0,
        "decode_tok_s": 40.0 * batch,
        "decode_spread": 0.1,
        "cache_bytes": 1000 * batch * tokens,
        "peak_resident_bytes": 10**9,
        "peak_device_bytes": None,
        "prefill_flop": 1e9,
        "decode_flop": 1e7 * batch,
        "prefill_flop_per_byte": 100.0,
        "decode_flop_per_byte": 1.0 * batch,
        "prefill_share_of_bound": 0.5,
        "decode_share_of_bound": None,
    } | more


RATIO = {"decode_ratio": 1.5, "decode_ratio_ci": [1.2, 1.8], "prefill_ratio": 0.9, "prefill_ratio_ci": None}
CELLS = [("batch", 1, 64), ("batch", 8, 64), ("context", 1, 512), ("context", 1, 1024)]
BENCH = HEAD | {
    "kind": "bench",
    "rounds": [],
    "settings": {"repeats": 3, "prompt_tokens": 64, "new_tokens": 4},
    "interval": "95 %, Student's t",
    "machine": {"bandwidth": 1e10, "peaks": {"float32": 5e10, "bfloat16": 1e11}, "load": [0.5, 3.0]},
    "environment": ENVIRONMENT,
    "models": [{"model": "base", "bits_per_weight": 16.0}, {"model": "w4", "bits_per_weight": 4.3}],
    "rows": [
        *(timed(model, *cell, **more) for cell in CELLS for model, more in (("base", {}), ("w4", RATIO))),
        {"model": "w4", "kind": "context", "batch": 1, "prompt_tokens": 8192, "skipped": "no positions"},
    ],
    "pairs": [
        {"group": "w4", "role": "equal bits", "control": "w5", "batch": 1, "prompt_tokens": 64} | RATIO
    ],
}
MATMUL = HEAD | {
    "kind": "matmul",
    "settings": {"draws": 2, "repeats": 3, "seed": 0, "device": "cpu"},
    "interval": "95 %, Student's t",
    "environment": ENVIRONMENT,
    "rows": [
        {"shape": "16x512", "format": "int8", "scales": "row", "rounding_error": 0.01, "documented": None}
        | {"rounding_error_range": [0.009, 0.011], "speed_over_float32": 2.0, "speed_over_float32_ci": None}
    ],
}


def written(text: str, tokens: int, prefix_tokens: int, prefix: str) -> dict:
    return {"text": text, "tokens": tokens, "prefix_tokens": prefix_tokens, "prefix": prefix}


FIGURES = {
    "prompts": 2,
    "prefix_tokens": 1.5,
    "prefix_tokens_ci": None,
    "divergence": 2.0,
    "divergence_ci": None,
    "identical_fraction": 0.5,
    "identical_ci": [0.09, 0.91],
    "bleu": 40.0,
    "bleu_ci": None,
    "bleu_signature": "nrefs:1",
    "rouge1": 0.5,
    "rouge1_ci": [0.2, 0.8],
    "rouge2": 0.4,
    "rouge2_ci": None,
    "rougeL": 0.5,
    "rougeL_ci": None,
}
GENERATION = HEAD | {
    "kind": "generation",
    "settings": {"max_new_tokens": 4, "dtype": "float32", "batch": 8},
    "interval": "95 % over prompts",
    "prompts": ["Once", "The dog"],
    "texts": {
        "base": [written("upon a", 2, 2, "upon a"), written("ran", 1, 1, "ran")],
        "w4": [written("upon the", 2, 1, "upon"), written("ran", 1, 1, "ran")],
    },
    "rows": [{"recipe": "base"} | FIGURES, {"recipe": "w4"} | FIGURES],
    "environment": ENVIRONMENT,
}
ASKED = {"task": "hellaswag", "metric": "acc", "n": 20, "protocol": "hellaswag/0-shot", "unparsed": None}
TASKS = HEAD | {
    "kind": "tasks",
    "models": {"base": {"model": "toy"}, "w4": {"model": "toy"}},
    "protocols": {"hellaswag": {"id": "hellaswag/0-shot", "tasks": 1, "items": 20, "sources": ["here"]}},
    "interval": "95 %: Wilson's",
    "test": "McNemar",
    "visible_difference": "at 5 %",
    "environment": ENVIRONMENT,
    "rows": [
        ASKED | {"model": "base", "value": 0.5, "value_ci": [0.3, 0.7], "difference": None},
        ASKED
        | {"model": "w4", "value": 0.45, "value_ci": [0.26, 0.66], "difference": -0.05}
        | {"difference_ci": [-0.2, 0.1], "lost": 2, "gained": 1, "p_value": 1.0, "p_holm": 1.0}
        | {"visible_difference": 0.31},
    ],
}
ATTACK = HEAD | {
    "kind": "attack",
    "settings": {"tokens": 8, "alpha": 0.01, "sequences": 20},
    "environment": ENVIRONMENT,
    "timed": 2,
    "left_out": [{"numerics": "isa", "problem": "no AVX2", "instead": None}],
    "rows": [
        {"attack": "int4", "detector": name, "auc": 0.9, "tpr_at_1pct_fpr": 0.8, "tpr_ci": [0.6, 0.9]}
        | {"tokens_to_99": tokens, "sees": sees}
        for name, tokens, sees in (("distance", 8, "some"), ("logits", None, "nothing"))
    ],
    "costs": [
        {"sampler": "greedy", "detector": "distance", "bytes_per_token": 16.0, "seconds_per_token": 1e-4}
        | {"prefill_seconds_per_token": 1e-3, "prover_seconds_per_token": 2e-4}
    ],
    "honest": [
        {"numerics": "same", "detector": "distance", "refused": 0, "n": 20}
        | {"false_positive_rate": 0.0, "false_positive_ci": [0.0, 0.17]}
    ],
    "about": {"int4": "weights of 4 bits"},
    "numerics_pooled": {"same": "as the verifier's"},
}
EXPERIMENTS = HEAD | {
    "kind": "experiments",
    "environment": ENVIRONMENT,
    "rows": [
        {"study": "exp1", "prover": "bf16 on cpu", "verifier": "w4 on cpu", "expected": [0.9, 1.0]}
        | {"avg_accept_rate": 0.95, "accept_rate_ci": None, "as_expected": True, "pass_rate": 1.0}
        | {"avg_overhead_percentage": 1.5, "refused": {"w8": "0/3"}, "avg_relative_distance": 0.01}
        | {"detection": {f"w{bits}": {"avg_accept_rate": 0.5} for bits in range(1, 15)}}
    ],
    "missing": [{"study": "exp2", "missing": "traces of the other machine"}],
    "left_out": [],
}
SEPARABILITY = HEAD | {
    "kind": "separability",
    "environment": ENVIRONMENT,
    "settings": {"trials": 100, "tokens": 16, "alpha": 0.01},
    "rows": [
        {"prover": "fp32", "verifier": "fp32", "honest": True, "tpr_at_fpr": None},
        {"prover": "w4", "verifier": "fp32", "honest": False, "tpr_at_fpr": 1.0},
    ],
    "missing": [],
}
HISTOGRAM = {"n": 3, "histogram": {"counts": [1, 2], "edges": [0.0, 0.5, 1.0]}}
DISTRIBUTIONS = dict.fromkeys(("Pe", "Pm", "mean_error", "accept_rate"), HISTOGRAM) | {"Pw": {"n": 0}}
THRESHOLDS = HEAD | {
    "kind": "thresholds",
    "environment": ENVIRONMENT,
    "rows": [
        {"study": "exp1", "direction": "bf16", "false_positive_rate": 0.0, "false_positive_ci": [0.0, 0.1]}
        | {"thresholds": {"Pe": 0.1, "Pm": 0.5, "Pw": 0.5, "mean_epsilon": 1e-3, "accept_rate_min": 0.9}}
        | {"attacks": {"w8": {"caught": 0.5, "caught_by_distance": 1.0}}}
        | {"distributions": dict.fromkeys(("bf16", *(f"w{bits}" for bits in range(9))), DISTRIBUTIONS)}
    ],
    "missing": [],
    "left_out": [],
}
STUDIES = HEAD | {"kind": "studies", "environment": ENVIRONMENT, "runs": [EXPERIMENTS, SEPARABILITY]}
STUDIES |= {"rows": [{"kind": "experiments"} | row for row in EXPERIMENTS["rows"]]}


def trial(number: int, state: str, kl: float | None) -> dict:
    return {
        "number": number,
        "state": state,
        "values": {"bits": 2, "group": None},
        "objectives": None if kl is None else [kl],
        "row": None if kl is None else {"bits_per_weight": 2.0 + number},
        "stopped": None if kl is not None else "too slow",
    }


SEARCH = HEAD | {
    "kind": "search",
    "settings": {"objectives": ["kl_mean"], "space": {"name": "two", "parameters": {"bits": {}, "group": {}}}}
    | {
        "sampler": "tpe",
        "windows": 4,
        "window": 64,
        "corpus": "wikitext2-raw",
        "at_most": {"size_bytes": 1e6},
    },
    "interval": "95 %",
    "rows": [
        {
            "recipe": "base",
            "bits_per_weight": 16.0,
            "ppl": 20.0,
            "ppl_ci": None,
            "kl_mean": 0.0,
            "kl_ci": None,
        },
        {"recipe": "two-000", "bits_per_weight": 2.0, "ppl": 30.0, "ppl_ci": [25.0, 35.0], "kl_mean": 0.5}
        | {"kl_ci": [0.4, 0.6], "against": {"w2": {"kl": -0.1, "kl_ci": None}}},
    ],
    "best": ["two-000"],
    "trials": [trial(0, "complete", 0.5), trial(1, "complete", 0.9), trial(2, "pruned", None)],
    "importance": {"kl_mean": {"bits": 0.9, "group": 0.1}},
    "environment": ENVIRONMENT,
}
ANALYSIS = HEAD | {
    "kind": "analysis",
    "environment": ENVIRONMENT,
    "recipe": {"name": "w3", "id": "3" * 64},
    "text": {"corpus": "c4-train", "samples": 2, "tokens": 32},
    "whole": {"bits_per_weight": 3.25, "matrices": 2, "kl": 0.7, "kl_se": None},
    "layers": [{"layer": place, "kl": 0.5, "kl_se": None, "kl_predicted": 0.4} for place in range(2)],
    "matrices": [
        {
            "name": f"layers.{place}.q",
            "layer": place,
            "kind": "attn.q",
            "bits": 3.25,
            "tokens": 64,
            "kl": None,
        }
        | {"weight_error": 0.1, "output_error": 0.01 * (place + 1), "kl_predicted": 0.1 * (place + 1)}
        for place in range(2)
    ],
    "routing": [],
}
CLAIMS = [
    {"section": "1", "claim": "better", "expected": "yes", "unit": "points", "not_measured": 1}
    | {"verdict": "not decidable at this n", "measured": [{"name": "a - b", "value": 0.1, "interval": None}]}
]
STUDY = HEAD | {
    "study": "a study",
    "about": "about it",
    "settings": {"dtype": "bfloat16"},
    "interval": "95 %",
    "claims": CLAIMS,
    "environment": ENVIRONMENT,
}
QUALITY = {"ppl": 20.0, "ppl_ci": [18.0, 22.0], "ppl_delta": 1.0, "ppl_delta_ci": None, "kl_mean": 0.012}
QUALITY |= {"kl_ci": [0.009, 0.016], "top1_agreement": 0.9, "top1_ci": [0.85, 0.93]}
REPLICATION = STUDY | {
    "kind": "replication",
    "protocol": "wikitext2-raw/1024[n=16]",
    "corpus_source": "bundled",
    "rows": [
        {"group": group, "role": role, "variant": group, "controls": [], "beats_single": None}
        | {"beats_equal_bits": None, "beats_equal_flops": None, "bits_per_weight": 4.0, "size_bytes": 1000}
        | {"flop_per_token": 1e6, "bytes_per_token": 1e5, "passes": 1.0}
        | QUALITY
        | {"kl_mean": kl, "kl_ci": kl_ci}
        for group, role, kl, kl_ci in (
            ("base", "plain", 0.0, None),
            ("copies", "replica", 0.012, [0.009, 0.016]),
            ("copies", "single", 0.4, [0.3, 0.5]),
        )
    ],
    "pairs": [
        {
            "group": "copies",
            "role": "single",
            "control": "w4",
            "kl": -0.1,
            "kl_ci": [-0.2, -0.05],
            "ppl": -1.0,
        }
        | {"ppl_ci": None, "beats": True, "kl_fraction": -0.1, "kl_fraction_ci": None, "read_ratio": 0.5}
    ],
    "drafts": [],
}
EIGHT_BIT = STUDY | {
    "kind": "eight-bit",
    "protocols": {"text": "wikitext2-raw", "questions": "mmlu", "questions_source": "bundled"},
    "rows": [
        {"variant": name, "format": format, "granularity": size, "kind": kind, "refused": None}
        | QUALITY
        | {f"{method}_{key}": value for method in ("direct", "generate") for key, value in shares.items()}
        for shares in [{"acc": 0.5, "acc_ci": [0.4, 0.6]}]
        for name, format, size, kind in (
            ("bf16", None, None, None),
            ("int8-row-fake", "int8", "row", "fake"),
            ("int8-g64-fake", "int8", "g64", "fake"),
        )
    ],
    "pairs": [
        {"family": "one step finer", "first": "int8-row-fake", "second": "int8-g64-fake"}
        | {"direct_difference": 0.01, "direct_difference_ci": [-0.02, 0.04], "direct_p_holm": 1.0}
        | {"generate_difference": 0.0, "generate_difference_ci": [-0.03, 0.03], "generate_p_holm": 1.0}
        | {"generate_visible_difference": 0.05, "kl": -0.01, "kl_ci": None, "ppl": 0.1, "ppl_ci": None}
    ],
    "uneven_groups": {},
    "speed": None,
    "products": {"rows": MATMUL["rows"]},
}
EVALUATION = HEAD | {
    "kind": "evaluation",
    "environment": ENVIRONMENT,
    "rows": [{"recipe": "w4", "protocol": "wikitext2-raw", "against": "base", "kl_p99": 0.3} | QUALITY],
}
AUDIT = HEAD | {
    "kind": "audit",
    "model": MODEL | {"origin": "https://toy.example/v1", "asked_for": "toy"},
    "environment": ENVIRONMENT,
    "settings": {"evidence": "greedy tokens", "corpus": "c4-train-new"},
    "rows": [
        {
            "request": 1,
            "positions": 8,
            "distance": 0.05,
            "control": 0.04,
            "score": 0.22,
            "p_value": 0.5,
            "problem": "",
        },
        {"request": 2, "positions": None, "distance": None, "control": None, "score": None, "p_value": None}
        | {"problem": "not-finite"},
        {"request": 3, "positions": 8, "distance": -0.2, "control": 0.3, "score": -0.67, "p_value": 0.5}
        | {"problem": ""},  # of sampled tokens: less surprising than they should be
    ],
    "probes": [{"evidence": "seeds repeat", "given": True, "detail": "", "honest": [True]}],
    "suspects": [
        {"suspect": "w8", "distance": 0.02, "nearest": 1, "answers": 1, "seen": 0.9, "seen_ci": [0.7, 1.1]},
        {"suspect": "the model that was claimed", "distance": 0.05, "nearest": 0, "answers": 1}
        | {"seen": None, "seen_ci": None},
    ],
    "decision": {
        "status": "PASS",
        "why": "set p 0.5 (level 0.01)",
        "alpha": 0.01,
        "tests": {"set": {"p_value": 0.5}},
    },
    "calibration": {"answers": 3, "servers": ["http://127.0.0.1:1/v1"], "scores": [-0.1, 0.0, 0.3]},
    "sequence": None,
    "receipts": {"given": 2, "valid": 2, "signers": ["ab" * 32]},
}
WATCH = HEAD | {
    "kind": "watch",
    "model": AUDIT["model"],
    "environment": ENVIRONMENT,
    "settings": AUDIT["settings"] | {"interval_seconds": 3600.0},
    "rows": [
        {
            "audit": 1,
            "created": "2026-11-30T12:00:00+00:00",
            "judged": 8,
            "score": 0.01,
            "requests": 8,
            "p_value": 1.0,
            "status": "PASS",
        }
    ],
    "decision": AUDIT["decision"],
}
CHANGE = HEAD | {
    "kind": "change",
    "model": AUDIT["model"],
    "environment": ENVIRONMENT,
    "settings": {"recorded_url": "https://toy.example/v1", "repeats": 3},
    "rows": [
        {"request": 1, "positions": 8, "then_now": 0.4, "now_now": 0.02, "rank": 4.0, "problem": ""},
        {"request": 2, "positions": 0, "then_now": None, "now_now": None, "rank": None}
        | {"problem": "no-evidence"},
    ],
    "decision": AUDIT["decision"] | {"requests": 1},
}
CONTRACT = HEAD | {
    "kind": "contract",
    "model": AUDIT["model"],
    "environment": ENVIRONMENT,
    "settings": {"requests": 16},
    "rows": [
        {
            "check": "max_tokens is kept",
            "kept": 15,
            "n": 16,
            "rate": 0.9375,
            "rate_ci": [0.7, 1.0],
            "honest_kept": 16,
            "honest_n": 16,
            "honest_rate": 1.0,
            "honest_ci": [0.79, 1.0],
            "p_value": 0.5,
        }
    ],
    "problems": [
        {"server": "https://toy.example/v1", "check": "max_tokens is kept", "request": 3}
        | {"problem": "26 tokens instead of 24"}
    ],
    "decision": AUDIT["decision"],
}
EVERY = {
    run["kind"]: run
    for run in (
        RUN,
        BENCH,
        MATMUL,
        GENERATION,
        TASKS,
        ATTACK,
        EXPERIMENTS,
        SEPARABILITY,
        THRESHOLDS,
        STUDIES,
        SEARCH,
        ANALYSIS,
        REPLICATION,
        EIGHT_BIT,
        EVALUATION,
        AUDIT,
        WATCH,
        CHANGE,
        CONTRACT,
    )
}

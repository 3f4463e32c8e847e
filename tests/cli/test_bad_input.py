"""What a new user gets wrong, over all verbs: one clear line, the right exit status, no traceback, nothing
written, and before any work: no model is loaded."""

import json
import os
import subprocess
import sys

import pytest

from bitassay.models import load as loading

S = "stories260k"
ASSAY, EVAL, QUANT = ["assay", S, "--recipe", "w4"], ["eval", S], ["quantize", S, "--recipe", "w4"]
PROVE = ["prove", S, "--prompt", "One day", "--out", "{out}/a.trace"]
VERIFY = ["verify", "{in}/empty.trace", "--model", S]
BENCH, GEN = ["bench", S, "--recipe", "w4"], ["generate", S, "--recipe", "w4"]
CAL, ATTACK = ["calibrate", S], ["attack", S]
STUDY, SEARCH = ["study", "run", "exp1", "--model", S], ["search", "two-bit", "--model", S]

# Words, what the message must say, and the exit status where it is not 2.
CASES = {
    # names
    "verb": (["asses", S], "no verb is called 'asses'; the nearest are 'assay'"),
    "model": (["assay", "smollm2-135", "--recipe", "w4"], "the nearest are 'smollm2-135m'"),
    "model, nothing near": (["eval", "zzzz"], "none of the 11 that there are is close"),
    "model in capitals and spaces": (["eval", "Smol LM2"], "no model is called 'Smol LM2'"),
    "empty model": (["eval", ""], "no model is called ''"),
    "model in Greek": (["eval", "μοντέλο"], "no model is called 'μοντέλο'"),
    "model that is a text file": (["eval", "{in}/prompts.txt"], "not a GGUF file"),
    "model that is an empty folder": (["eval", "{in}/folder"], "no config.json"),
    "model that is a missing .gguf": (["eval", "{in}/no.gguf"], "No such file"),
    "model that is an empty .gguf": (["eval", "{in}/empty.gguf"], "not a GGUF file"),
    "folder with a broken config": (["eval", "{in}/broken"], "broken"),
    "encoder-decoder": (["quantize", "{in}/t5", "--recipe", "w4", "--out", "{out}/q"], "t5"),
    "encoder-decoder, eval": (["eval", "{in}/t5"], "t5"),
    "against": ([*EVAL, "--against", "smollm3"], "no model is called 'smollm3'"),
    "candidate": (["generate", S, "--candidate", "{in}/nowhere"], "{in}/nowhere"),
    "claim": ([*PROVE, "--claim", "qwen9"], "no model is called 'qwen9'"),
    "recipe": (["assay", S, "--recipe", "w44"], "the nearest are 'w4'"),
    "recipe, nothing near": (["assay", S, "--recipe", "zzzz"], "is close"),
    "recipe in capitals": (["assay", S, "--recipe", "W4"], "the nearest are 'w4'"),
    "recipe given twice": (["assay", S, "--recipe", "w4", "--recipe", "w4"], "--recipe w4 is given twice"),
    "recipe that is a folder": (["assay", S, "--recipe", "{in}/folder"], "a folder that is no .yaml file"),
    "recipe that is a text file": (["assay", S, "--recipe", "{in}/prompts.txt"], "a file that is no .yaml"),
    "recipe that is missing": (["assay", S, "--recipe", "{in}/no.yaml"], "No such file"),
    "recipe that is empty": (["assay", S, "--recipe", "{in}/empty.yaml"], "not a recipe: empty"),
    "recipe that is a list": (["assay", S, "--recipe", "{in}/list.yaml"], "not a recipe: a list"),
    "recipe that is no YAML": (["assay", S, "--recipe", "{in}/tabs.yaml"], "not valid YAML"),
    "recipe in UTF-16": (["assay", S, "--recipe", "{in}/utf16.yaml"], "UTF-16 text, not UTF-8"),
    "recipe that is binary": (["quantize", S, "--recipe", "{in}/binary.yaml", "--out", "{out}/q"], "not text"),
    "recipe with an unknown field": (["eval", S, "--recipe", "{in}/field.yaml"], "there is no field 'weigths'; the nearest are 'weights'"),
    "recipe with an unknown part of a part": (["eval", S, "--recipe", "{in}/part.yaml"], "gptq: there is no field 'dampin'; the nearest are 'damping'"),
    "recipe with an unknown format": (["eval", S, "--recipe", "{in}/format.yaml"], "unknown format 'int44'; the nearest are 'int4'"),
    "recipe for other modules": (["eval", S, "--recipe", "{in}/modules.yaml"], "applies to no module"),
    "recipe for other modules, bench": (["bench", S, "--recipe", "{in}/modules.yaml"], "applies to no module"),
    "recipe for other modules, prove": ([*PROVE, "--recipe", "{in}/modules.yaml"], "applies to no module"),
    "recipe for other modules, calibrate": ([*CAL, "--recipe", "{in}/modules.yaml"], "applies to no module"),
    "recipe calibrated on a missing file": (["eval", S, "--recipe", "{in}/calibrated.yaml"], "nowhere.txt"),
    "recipe of LLM Compressor": (["eval", S, "--recipe", "{in}/llmcompressor.yaml"], "looks like an LLM Compressor recipe"),
    "task of lm-eval": (["eval", S, "--recipe", "{in}/lmeval.yaml"], "looks like an lm-eval task"),
    "configuration of mergekit": (["eval", S, "--recipe", "{in}/mergekit.yaml"], "looks like a mergekit"),
    "configuration of Axolotl": (["eval", S, "--recipe", "{in}/axolotl.yaml"], "looks like an Axolotl"),
    "configuration of AutoRound": (["eval", S, "--recipe", "{in}/autoround.yaml"], "looks like an AutoRound"),
    "recipes show": (["recipes", "show", "w44"], "the nearest are 'w4'"),
    "models check": (["models", "check", "stories"], "the nearest are 'stories260k'"),
    "models pull": (["models", "pull", "stories"], "the nearest are 'stories260k'"),
    "study": (["study", "run", "phase9", "--model", S], "no experiment is called 'phase9'; the nearest are 'phase"),
    "studies of two kinds": (["study", "run", "exp1", "phase1", "--model", S], "one command for each kind"),
    "study without a model": (["study", "run", "exp1"], "no model was given"),
    "study, devices": ([*STUDY, "--devices", "cpu+avx3"], "no numerics are called 'avx3'"),
    "study, rules": ([*STUDY, "--rules", "documnts"], "the nearest are 'documents'"),
    "study, quantized": ([*STUDY, "--quantized", "w44"], "neither a recipe nor a checkpoint"),
    "study, group": (["study", "run", "phase1", "--model", S, "--only", "nonsense"], "has no group 'nonsense'"),
    "space": (["search", "two-bits", "--model", S], "the nearest are 'two-bit'"),
    "objective": ([*SEARCH, "--objective", "kl_men"], "the nearest are 'kl_mean'"),
    "limit of a search": ([*SEARCH, "--at-most", "bits"], "'bits' is no limit"),
    "corpus of a search": ([*SEARCH, "--corpus", "wikitext"], "the nearest are 'wikitext2-raw'"),
    "protocol": ([*EVAL, "--protocol", "wikitext"], "the nearest are 'wikitext2-raw'"),
    "protocol of a missing file": ([*EVAL, "--protocol", "{in}/no.txt"], "No such file"),
    "task": ([*EVAL, "--tasks", "helaswag"], "the nearest are 'hellaswag'"),
    "no task": ([*EVAL, "--tasks", ","], "no task was given"),
    "attack": ([*ATTACK, "--attacks", "int44"], "the nearest are 'int"),
    "numerics": ([*ATTACK, "--numerics", "eagr"], "the nearest are 'eager'"),
    "suspects": ([*CAL, "--suspects", "int9"], "no such attack; the nearest are 'int"),
    # numbers
    "alpha 2": ([*ASSAY, "--alpha", "2"], '"2.0" for --alpha'),
    "alpha 0": ([*CAL, "--alpha", "0"], '"0.0" for --alpha'),
    "alpha nan": ([*VERIFY, "--alpha", "nan"], '"nan" for --alpha'),
    "alpha too small for the runs": ([*ASSAY, "--alpha", "0.001"], "too few for alpha 0.001"),
    "too few tokens for verdicts": ([*ASSAY, "--new-tokens", "8"], "with 8 or more generated positions"),
    "too few tokens for a profile": ([*CAL, "--max-new-tokens", "8"], "with 8 or more generated positions"),
    "too few runs": ([*ASSAY, "--calibration-prompts", "10"], "too few for alpha"),
    "more prompts than there are": ([*CAL, "--prompts", "100000"], "the package has 1340"),
    "no windows": ([*ASSAY, "--windows", "0"], '"0" for --windows'),
    "negative windows": ([*EVAL, "--windows", "-3"], "--windows"),
    "no window": ([*EVAL, "--window", "0"], '"0" for --window'),
    "a window of one token": ([*ASSAY, "--window", "1"], "a window of 1 tokens predicts nothing"),
    "words for numbers": ([*ASSAY, "--windows", "many"], 'unable to convert "many"'),
    "a fraction for a count": ([*ASSAY, "--windows", "1.5"], "1.5"),
    "negative seed": ([*EVAL, "--seed", "-1"], "--seed"),
    "huge seed": ([*GEN, "--seed", str(2**70)], "--seed"),
    "no limit": ([*EVAL, "--tasks", "hellaswag", "--limit", "0"], '"0" for --limit'),
    "no batch": ([*GEN, "--batch", "0"], '"0" for --batch'),
    "no tokens": ([*GEN, "--new-tokens", "0"], '"0" for --new-tokens'),
    "no trials": ([*SEARCH, "--trials", "0"], '"0" for --trials'),
    "more short windows than windows": ([*SEARCH, "--short", "9"], "9 of 8 windows come first"),
    "no jobs": ([*STUDY, "--jobs", "0"], '"0" for --jobs'),
    "no repeats": ([*BENCH, "--repeats", "0"], '"0" for --repeats'),
    "no batches": ([*BENCH, "--batches", "0"], "--batches"),
    "a bad shape": (["bench", "matmul", "--shapes", "3by4"], "is not a shape"),
    "a huge shape": (["bench", "matmul", "--shapes", "3x99999999"], "3x99999999"),
    "temperature": ([*PROVE, "--temperature", "-1"], "temperature -1.0 is not between"),
    "top_p": ([*PROVE, "--top-p", "2"], "top_p 2.0 is not in"),
    "sequences": ([*ATTACK, "--sequences", "5"], "10 sequences at least"),
    "more sequences than prompts": ([*ATTACK, "--sequences", "500"], "at most 400 prompts"),
    # devices and dtypes
    "dtype": ([*EVAL, "--dtype", "float23"], 'Did you mean "float32"?'),
    "dtype of a trace": ([*PROVE, "--dtype", "float64"], '"float64" for --dtype'),
    "precision": ([*STUDY, "--precision", "fp61"], '"fp61" for --precision'),
    "no device": ([*PROVE, "--device", "GPU 0"], "A device is cpu, cuda"),
    "unknown device": ([*PROVE, "--device", "gpu"], "'gpu' is no device"),
    "meta": ([*VERIFY, "--device", "meta"], "'meta' computes nothing"),
    "mps": ([*PROVE, "--device", "mps"], "no device 'mps' here", 3),
    "cuda, prove": ([*PROVE, "--device", "cuda:7"], "no device 'cuda:7' here", 3),
    "cuda, verify": ([*VERIFY, "--device", "cuda:7"], "no device 'cuda:7' here", 3),
    "cuda, calibrate": ([*CAL, "--device", "cuda:7"], "no device 'cuda:7' here", 3),
    "cuda, bench": ([*BENCH, "--device", "cuda:7"], "no device 'cuda:7' here", 3),
    "cuda, matmul": (["bench", "matmul", "--device", "cuda:7"], "no device 'cuda:7' here", 3),
    "cuda, task3": (["study", "run", "task3.1", "--model", S, "--devices", "cuda:7"], "no device 'cuda:7' here", 3),
    # files and folders
    "out that is a file": ([*ASSAY, "--out", "{in}/prompts.txt"], "a file is where a folder should be"),
    "out under a file": ([*EVAL, "--tasks", "hellaswag", "--out", "{in}/prompts.txt/x"], "prompts.txt/x"),
    "out where nothing can be written": ([*ASSAY, "--out", "/proc/nowhere/x"], "/proc/nowhere/x"),
    "out of quantize that is not empty": ([*QUANT, "--out", "{in}/full"], "holds something else"),
    "out of a study": ([*STUDY, "--out", "/proc/nowhere"], "/proc/nowhere"),
    "out of a search": ([*SEARCH, "--out", "{in}/prompts.txt"], "a file is where a folder should be"),
    "out of generate": ([*GEN, "--out", "/proc/nowhere"], "/proc/nowhere"),
    "out of bench": ([*BENCH, "--out", "/proc/nowhere"], "/proc/nowhere"),
    "out of attack": ([*ATTACK, "--out", "/proc/nowhere"], "/proc/nowhere"),
    "page of matmul": (["bench", "matmul", "--out", "{in}/folder"], "a folder is where a file should be"),
    "trace that is a folder": ([*PROVE[:-1], "{in}/folder"], "a folder is where a file should be"),
    "profile that is a folder": ([*CAL, "--out", "{in}/folder"], "a folder is where a file should be"),
    "gguf that is a folder": ([*QUANT, "--gguf", "{in}/folder"], "a folder is where a file should be"),
    "work that is a file": ([*QUANT, "--out", "{out}/q", "--work", "{in}/prompts.txt"], "a file is where a folder"),
    "no such layout": ([*QUANT, "--out", "{out}/q", "--layout", "dense"], "no 'dense'; there are 'bitassay'"),
    "layout without a folder": ([*QUANT, "--gguf", "{out}/g", "--layout", "bitassay"], "--layout belongs to the folder"),
    "tokens beyond the positions, prove": ([*PROVE, "--max-new-tokens", "5000"], "5000 tokens do not fit its 512 positions"),
    "tokens beyond the positions, calibrate": ([*CAL, "--max-new-tokens", "5000"], "do not fit its 512 positions"),
    "tokens beyond the positions, attack": ([*ATTACK, "--tokens", "5000"], "do not fit its 512 positions"),
    "tokens beyond the positions, generate": ([*GEN, "--new-tokens", "5000"], "do not fit its 512 positions"),
    "tokens beyond the positions, study": (STUDY, "1299 tokens do not fit its 512 positions"),
    "more prompts of an assay than there are": ([*ASSAY, "--prompts", "9000"], "the package has 800"),
    "more prompts of generate than there are": ([*GEN, "--prompts", "9000"], "there are 800"),
    "nowhere to write to": (QUANT, "--out FOLDER, --gguf FILE, or both"),
    "report that is a folder": (["report", "{in}/folder", "--out", "{in}/folder"], "a folder is where a file"),
    "report of nothing": (["report"], "no run folder was given"),
    "report of an empty folder": (["report", "{in}/folder", "--out", "{out}/r.html"], "run.json"),
    "prompts that are missing": (["prove", S, "--prompts", "{in}/no.txt", "--out", "{out}/t"], "No such file"),
    "prompts that are a folder": (["prove", S, "--prompts", "{in}/folder", "--out", "{out}/t"], "Is a directory"),
    "prompts that are empty": (["prove", S, "--prompts", "{in}/empty.txt", "--out", "{out}/t"], "no prompts in it"),
    "prompts that are binary": (["generate", S, "--recipe", "w4", "--prompts-file", "{in}/binary.txt"], "not text"),
    "prompts without the field": (["generate", S, "--recipe", "w4", "--prompts-file", "{in}/wrong.jsonl"], "a field 'prompt'"),
    "prompts of calibrate": ([*CAL, "--prompts", "{in}/no.txt"], "No such file"),
    "key that is a folder": ([*PROVE, "--commit-only", "--key", "{in}/folder"], "not a private key"),
    "key that is none": ([*PROVE, "--commit-only", "--key", "{in}/private.txt"], "not a private key"),
    "nonce": ([*PROVE, "--nonce", "a b"], "the nonce 'a b'"),
    "no trace": (["verify", "{in}/no.trace", "--model", S], "no trace there"),
    "folder without traces": (["verify", "{in}/folder", "--model", S], "no trace there"),
    "profile": ([*VERIFY, "--profile", "{in}/no.json"], "no such file"),
    "profile that is none": ([*VERIFY, "--profile", "{in}/wrong.json"], "wrong.json"),
    "ledger that is none": ([*VERIFY, "--ledger", "{in}/prompts.txt"], "not a ledger"),
    "ledger that is a folder": ([*VERIFY, "--ledger", "{in}/folder"], "a folder is where a file should be"),
    "signer": ([*VERIFY, "--receipt", "{in}/prompts.txt", "--challenge", "{in}/prompts.txt", "--signer", "zz"], "prompts.txt"),
    "prompts for other traces": ([*VERIFY, "--prompts", "{in}/prompts.txt"], "2 prompts for 1 traces"),
    "receipt": (["challenge", "{in}/prompts.txt", "--out", "{out}/c"], "prompts.txt"),
    "challenge": (["open", "{in}/no.trace", "--challenge", "{in}/no.json", "--out", "{out}/o"], "no.json"),
    "task of a committee": (["committee", "commit", "{in}/wrong.json", "--answers", "{in}/wrong.json", "--report", "{out}/r", "--out", "{out}/c"], "wrong.json"),
    "items of a committee": (["committee", "assign", "--items", "{in}/empty.txt", "--plants", "{in}/wrong.json", "--out", "{out}/c"], "no items"),
    # options that exclude each other or are missing
    "recipe and against": ([*EVAL, "--recipe", "w4", "--against", S], "give one of them"),
    "tasks and windows": ([*EVAL, "--tasks", "hellaswag", "--windows", "3"], "belong to perplexity"),
    "limit without tasks": ([*EVAL, "--limit", "3"], "belong to tasks"),
    "prompt and prompts": ([*PROVE, "--prompts", "{in}/prompts.txt"], "give either --prompt or --prompts"),
    "key without commit-only": ([*PROVE, "--key", "{out}/k"], "go together"),
    "analyze and gguf": ([*QUANT, "--analyze", "--gguf", "{out}/g.gguf"], "--analyze writes no model"),
    "samples without analyze": ([*QUANT, "--out", "{out}/q", "--samples", "3"], "belong to --analyze"),
    "nothing to compare": (["generate", S], "nothing to compare the model with"),
    "unknown option": ([*ASSAY, "--widows", "3"], "Did you mean --windows?"),
    "option without a value": ([*ASSAY, "--windows"], "--windows requires an argument"),
    "no recipe": (["assay", S], "--recipe requires an argument"),
    "unknown command": (["models", "lst"], "lst"),
    "too many words": (["doctor", "now"], "now"),
    "format": (["models", "list", "--format", "yaml"], '"yaml" for --format'),
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Files and folders as users have them, in a folder with spaces and letters of other alphabets."""
    folder = tmp_path_factory.mktemp("given") / "ein Ordner µ"
    for name in ("folder", "full", "broken", "t5"):
        (folder / name).mkdir(parents=True)
    text = {
        "prompts.txt": "One day\nTwo days\n",
        "empty.txt": "",
        "empty.yaml": "",
        "empty.gguf": "",
        "empty.trace": "",
        "list.yaml": "- a\n- b\n",
        "tabs.yaml": "a:\n\t- b: [\n",
        "field.yaml": "name: mine\nweigths: {format: int4}\n",
        "part.yaml": "name: mine\nweights: {format: int4}\ngptq: {dampin: 0.1}\n",
        "format.yaml": "name: mine\nweights: {format: int44}\n",
        "modules.yaml": "name: mine\nweights: {format: int4}\noverrides: [{match: '*.nothing', weights: null}]\n",
        "calibrated.yaml": "name: mine\nweights: {format: int4}\ngptq: {}\ncalibration: {corpus: nowhere.txt}\n",
        "llmcompressor.yaml": "quant_stage:\n  quant_modifiers:\n    GPTQModifier: {scheme: W4A16}\n",
        "lmeval.yaml": "task: mine\ndataset_path: x\ndoc_to_text: y\noutput_type: multiple_choice\n",
        "mergekit.yaml": "merge_method: slerp\nbase_model: x\nslices: []\ndtype: bfloat16\n",
        "axolotl.yaml": "base_model: x\nadapter: lora\ndatasets: []\nmicro_batch_size: 2\nsequence_len: 2048\n",
        "autoround.yaml": "bits: 4\ngroup_size: 128\nautoround_version: 0.5\niters: 200\n",
        "wrong.jsonl": '{"text": "a"}\n',
        "wrong.json": '{"a": 1}',
        "full/notes.txt": "mine",
        "broken/config.json": "{",
        "broken/model.safetensors": "",
        "t5/config.json": json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}),
        "t5/model.safetensors": "",
    }  # fmt: skip
    for name, content in text.items():
        (folder / name).write_text(content)
    (folder / "utf16.yaml").write_bytes("name: mine\n".encode("utf-16"))
    for name in ("binary.yaml", "binary.txt"):
        (folder / name).write_bytes(bytes(range(256)))
    (folder / "private.txt").write_text("secret")
    (folder / "private.txt").chmod(0o600)
    return folder


@pytest.fixture
def _nothing_is_loaded(monkeypatch):
    """Weights would be read here."""

    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "read_plain", loaded)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("_nothing_is_loaded")
def test_one_clear_line_before_any_work(bitassay, given, tmp_path, monkeypatch, case):
    words, said, *status = CASES[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path / "cache"))
    before = sorted(os.walk(given))

    def filled(text):
        return text.replace("{in}", str(given)).replace("{out}", str(tmp_path / "out"))

    done = bitassay(*map(filled, words))
    assert (done.status, done.out) == (status[0] if status else 2, ""), done.err
    lines = done.err.strip().splitlines()
    message = [line for line in lines if line.startswith("error: ")]
    assert len(message) == 1, done.err
    assert lines[-1].startswith("  try: ") or lines[-1] == message[0]
    assert filled(said) in done.err
    assert "Traceback" not in done.err
    assert len(message[0]) < 400
    assert not any(file for _, _, files in os.walk(tmp_path) for file in files), "something was written"
    assert sorted(os.walk(given)) == before


def test_what_words_alone_say_wrong_imports_nothing_heavy(given, tmp_path):
    """All in one process: none of these may import torch, which takes seconds."""
    light = [
        words
        for name, (words, *_) in CASES.items()
        if name
        in {
            *("verb", "model", "model, nothing near", "model that is a text file", "against", "recipe"),
            *("recipe that is empty", "recipe of LLM Compressor", "recipes show", "models check", "alpha 2"),
            *("no windows", "words for numbers", "negative seed", "dtype", "no device"),
            *("out that is a file", "out of a search", "trace that is a folder", "prompts that are missing"),
            *("no trace", "recipe and against", "prompt and prompts", "unknown option", "no recipe", "claim"),
        }
    ]
    assert len(light) == 26
    words = json.dumps(light).replace("{in}", str(given)).replace("{out}", str(tmp_path))
    script = """
import json, sys
from bitassay import cli
for words in json.loads(sys.stdin.read()):
    assert cli.run(words) == 2, words
    assert not {"torch", "transformers", "numpy"} & set(sys.modules), words
"""
    done = subprocess.run([sys.executable, "-c", script], input=words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

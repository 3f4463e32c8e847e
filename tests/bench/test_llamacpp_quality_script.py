"""benchmarks/llamacpp_quality.py: each window's own mean, files paired by window, those of similar bytes only."""

import argparse
from pathlib import Path

import pytest

PRINTED = """
chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1      37.5410 ±    4.3117       0.24862 ±    0.05138       0.30000 ±    0.03017    10.5 ±  0.9 %    72.0 ±  2.0 %
   2      30.1234 ±    2.3117      -0.04862 ±    0.05138       0.20000 ±    0.01017    10.5 ±  0.9 %    72.0 ±  2.0 %
   3      30.1234 ±    2.3117       0.04862 ±    0.05138       0.25000 ±    0.01017    10.5 ±  0.9 %    72.0 ±  2.0 %

Mean    KLD:   0.250000 ±   0.010000
"""


@pytest.fixture(scope="module")
def script(benchmark):
    return benchmark("llamacpp_quality")


def row(size, *windows):
    return {
        "bytes": size,
        "bits": 4.5,
        "windows": windows,
        "kl": sum(windows) / len(windows),
        "kl_99.9": 3.0,
        "ppl": 20.0,
    }


def test_the_means_of_windows_follow_from_running_ones(script):
    assert script.window_means(PRINTED) == pytest.approx([0.3, 0.1, 0.35])


def test_files_are_paired_by_window_where_theirs_are_not_much_larger(script):
    rows = {
        "ours-a": row(100, 0.10, 0.21, 0.30, 0.41),
        "Q4_0": row(100, 0.20, 0.30, 0.41, 0.50),
        "Q4_1": row(110, 0.10, 0.20, 0.31, 0.41),
        "Q8_0": row(180, 0.01, 0.01, 0.02, 0.02),
    }
    said = script.tables(rows)
    compared = [line for line in said.splitlines() if line.startswith("| ours-a | Q")]
    assert len(compared) == 2
    assert "| 1.000 | -0.0975 [" in compared[0]
    assert compared[0].endswith("| lower |")
    assert "| Q4_1 | 1.100 |" in compared[1]
    assert compared[1].endswith("|  |")
    figure = script.pareto_figure(rows, "four files")
    assert {text.get_text() for text in figure.axes[0].texts} == {"a", "Q4_0", "Q4_1", "Q8_0"}


def test_a_recipe_can_follow_the_types_of_a_file_of_llama_quantize(script, tmp_path, monkeypatch):
    commands = []

    def ran(command, log):
        commands.append([str(part) for part in command])
        if "--imatrix" in commands[-1]:
            (tmp_path / "Q4_K_M.part").touch()

    monkeypatch.setattr(script, "ran", ran)
    said = argparse.Namespace(model="m", bin=Path("bin"), threads=1, embeddings="Q8_0")
    path = script.ours(said, "short=short.yaml@Q4_K_M", tmp_path, Path("base.gguf"), Path("imatrix.gguf"))
    assert path == tmp_path / "ours-short-like-Q4_K_M.gguf"
    given, ours = commands
    assert given[0] == "bin/llama-quantize"
    assert "Q4_K_M" in given
    assert ours[ours.index("--like") + 1] == str(tmp_path / "Q4_K_M.gguf")
    assert ours[ours.index("--recipe") + 1] == "short.yaml"
    assert "--embeddings" not in ours

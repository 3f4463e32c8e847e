"""benchmarks/llamacpp_quality.py: each window's own mean, files paired by window, those of similar bytes only."""

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

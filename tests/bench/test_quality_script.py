"""The table of benchmarks/quality.py: what was not timed is shown, rows are paired with peers of equal bits, and
each recipe with the one before it."""

import pytest


@pytest.fixture(scope="module")
def quality(benchmark):
    return benchmark("quality")


def row(tool, bits, kl, **more):
    figures = {"ppl": 20.0, "ppl_ci": [19.0, 21.0], "kl_mean": sum(kl) / len(kl), "kl_ci": [min(kl), max(kl)]}
    return {
        "tool": tool, "bits": bits, "group": 64, "bits_per_weight": bits + 0.3, "kl_by_window": kl,
        "seconds": None, "peak_bytes": None, **figures, **more,
    }  # fmt: skip


def test_pairs_are_of_equal_bits_and_windows(quality, capsys):
    rows = [
        row("bitassay mine", 2, [0.1, 0.2, 0.3, 0.4]),
        row("autoround", 2, [0.19, 0.31, 0.41, 0.49], seconds=3.0, peak_bytes=10**9),
        row("autoround", 3, [0.1, 0.1, 0.1, 0.1]),
    ]
    (pair,) = quality.pairs(rows)
    assert pair["kl_difference"] == pytest.approx(-0.1)
    assert pair["kl_difference_ci"][0] < -0.1 < pair["kl_difference_ci"][1] < 0
    rows.append(row("bitassay next", 2, [0.1, 0.2, 0.2, 0.3]))
    (step,) = quality.steps(rows)
    assert (step["ours"], step["other"]) == ("bitassay next", "bitassay mine")
    assert step["kl_difference"] == pytest.approx(-0.05)
    quality.show({"rows": rows, "pairs": [pair], "steps": [step], "refused": []})
    said = capsys.readouterr().out
    assert "nan" in said
    assert "bitassay mine - autoround at 2 bits" in said
    assert "bitassay next - bitassay mine: KL -0.05" in said

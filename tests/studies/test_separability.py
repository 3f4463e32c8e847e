"""Every precision against every precision."""

import pytest

from bitassay.errors import BitassayError
from bitassay.studies.machines import Machine
from bitassay.studies.verillm.separability import run_separability
from bitassay.studies.verillm.work import ExperimentPlan

PLAN = ExperimentPlan(
    "stories260k", (Machine("cpu"), Machine("cpu+avx2")), 6, 10, trials=9, precision="bf16", batch=3
)


@pytest.mark.slow
def test_a_verifier_tells_other_precisions_from_its_own(tmp_path, started):
    run = run_separability(PLAN, precisions=("bf16", "w4", "w2"), alpha=0.1, out=tmp_path)
    rows = {(row["prover"], row["verifier"]): row for row in run["rows"]}
    assert len(rows) == 9
    for (prover, verifier), row in rows.items():
        assert row["honest"] == (prover == verifier)
        assert (row["tpr_at_fpr"] is None) == row["honest"]
        if not row["honest"]:
            assert row["auc"] == 1
            assert row["tpr_at_fpr"] == 1
            assert row["relative_distance"] > 3 * rows[verifier, verifier]["relative_distance"]
    assert (tmp_path / "raw" / "separability" / "stories260k_cpu_summary.json").exists()
    started.clear()
    again = run_separability(PLAN, precisions=("bf16", "w4", "w2"), alpha=0.1, out=tmp_path)
    assert (started, again["rows"]) == ([], run["rows"])


def test_too_few_trials_and_unknown_precisions(tmp_path, started):
    with pytest.raises(BitassayError, match="--trials 99"):
        run_separability(PLAN, out=tmp_path)
    with pytest.raises(BitassayError, match="'w5' is neither"):
        run_separability(PLAN, precisions=("bf16", "w5"), alpha=0.1, out=tmp_path)
    assert started == []

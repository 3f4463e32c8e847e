"""Mixed bits: a scheme for each matrix, so that the average of stored bits stays under a budget.

Matrix m under choice c costs d_mc (how much the model minds, `sensitivity.py`) and takes b_mc bits, scales
and all. Choose

    min sum_m d_m,c(m)   with   sum_m b_m,c(m) <= B

a multiple-choice knapsack, solved exactly as an integer program (HiGHS through scipy). That costs add up is
an assumption, the one that HAWQ-V2 (1911.03852), and most work since, makes.

Left out: choices below one matrix (groups of channels), and the order in which matrices spoil each other.
"""

import numpy as np
from jaxtyping import Float, Int

from bitassay.errors import BitassayError

TOLERANCE = 1e-5  # of the budget: more than HiGHS may overdraw it by


def allocate(
    costs: Float[np.ndarray, "matrices choices"], bits: Int[np.ndarray, "matrices choices"], budget: float
) -> Int[np.ndarray, " matrices"]:
    """The choice of each matrix with the least sum of costs among those whose bits sum to at most `budget`.

    Costs are not negative; a choice that a matrix does not have costs infinity. Raises BitassayError where no
    choice keeps to the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import eye_array, kron

    assert (costs >= 0).all(), "a cost is negative, or not a number"
    assert np.isfinite(costs).any(1).all(), "each matrix needs a choice"
    count, choices = costs.shape
    allowed = np.isfinite(costs)
    least = np.where(allowed, bits, bits.max()).min(1).sum()
    if least > budget:
        raise BitassayError(f"a budget of {budget:.0f} bits, where the fewest that fit are {least}")
    finite = np.where(allowed, costs, 0.0)
    # HiGHS stops at an absolute gap of 1e-6.
    finite *= 1e4 / (finite.max() or 1.0)
    one_each = kron(eye_array(count), np.ones((1, choices)), format="csr")
    for share in (1.0, 1 - TOLERANCE):
        found = milp(
            finite.ravel(),
            integrality=np.ones(count * choices),
            bounds=Bounds(0, allowed.ravel().astype(float)),  # type: ignore[arg-type]
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(bits.ravel()[None] / budget, -np.inf, share),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:  # nothing takes less than all of the budget
            break
        chosen = found.x.reshape(count, choices).argmax(1)
        if bits[np.arange(count), chosen].sum() <= budget:
            return chosen
    assert least > (1 - TOLERANCE) * budget, found.message
    return np.where(allowed, bits, bits.max() + 1).argmin(1)

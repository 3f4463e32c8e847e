"""Exact checks as a detector: shape and claims of a trace, signatures and Merkle proofs of receipts, the
rules of a committee (`structure.py`, `submissions.py`). They run before any prefill, and one defect decides.
"""

from bitassay.verification.detectors.detector import Detector

STRUCTURE = Detector("structure", "exact checks", lambda comparison, proof: (), smallest_sd=1.0, exact=True)

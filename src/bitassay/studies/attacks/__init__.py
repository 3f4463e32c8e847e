"""The study of all attacks against all detectors; the attacks are in `verification/attacks/`."""

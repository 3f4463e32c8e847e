"""Which model ran: traces, evidence, calibrated verdicts."""

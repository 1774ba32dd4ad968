"""From figures to a verdict: criteria, the ledger, the conditions of validity."""

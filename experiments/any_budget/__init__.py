"""One model for several budgets: against a model for each, its causal rules, and budgets that a batch shares."""

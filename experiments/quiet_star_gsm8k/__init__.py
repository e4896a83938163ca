"""Quiet-STaR on grade-school maths. README.md has the claim, the command and the results."""

"""Quiet-STaR where thinking is needed. README.md has the claim, the command and the results."""

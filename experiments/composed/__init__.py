"""Mixture-of-Depths, thoughts on budget and CoT-decoding at once. README.md has the claim and the results."""

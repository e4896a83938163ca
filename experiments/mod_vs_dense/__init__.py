"""Mixture-of-Depths against dense at equal training FLOPs. README.md has the claim, the command and the results."""

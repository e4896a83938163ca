"""Mixture-of-Depths-and-Experts, staged and integrated, against experts alone and a dense model: see README.md."""

"""Quiet-STaR: thoughts sampled in parallel after positions of a text, scored in one pass, trained by REINFORCE."""

"""Quiet-STaR: thoughts sampled in parallel after positions of a text, scored in one pass, trained by REINFORCE.

Import `sample_thought` from `mod_star.thinking.sample`, `score_thought` from `mod_star.thinking.score`, and
`talk_loss` from `mod_star.thinking.objective`.
"""

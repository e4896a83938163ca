"""Plans: what a training step needs of a machine, learned by compiling it on another one.

Import `plan_training` from `mod_star.planning.plan_training`, and `Plan` from `mod_star.planning.plan`.
"""

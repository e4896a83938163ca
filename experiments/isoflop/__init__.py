"""Dense against Mixture-of-Depths models at equal FLOPs per forward pass and equal steps, for several budgets."""

"""A pretrained model made Mixture-of-Depths. README.md has the claim, the command and the results."""

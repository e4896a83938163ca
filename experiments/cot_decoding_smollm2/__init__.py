"""CoT-decoding with SmolLM2-135M. README.md has the claim, the command and the results."""

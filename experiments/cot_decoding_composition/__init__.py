"""CoT-decoding where the second token leads to the answer. README.md has the claim, the command and the results."""

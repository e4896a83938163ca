"""CoT-decoding where the second first token knows better. README.md has the claim, the command and the results."""

"""What a thought can hold, by its length. README.md has the claim, the command and the results."""

"""Where a thought helps: entropy against a learned decider. README.md has the claim, the command and the results."""

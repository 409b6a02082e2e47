"""Where the packed formats come from, and what they cost in accuracy."""

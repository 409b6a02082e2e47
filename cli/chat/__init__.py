"""The conversation on a terminal: reading lines, commands, and answers that stream."""

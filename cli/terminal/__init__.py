"""Answers on a terminal: Markdown as it streams, thinking in a window that folds, lines of status."""

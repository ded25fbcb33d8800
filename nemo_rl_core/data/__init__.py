"""Data of a run: rows, prompts, chat to tokens, and their order."""

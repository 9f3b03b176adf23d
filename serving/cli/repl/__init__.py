"""Conversations at the terminal: lines that are read, commands that begin with /, settings, history, pictures."""

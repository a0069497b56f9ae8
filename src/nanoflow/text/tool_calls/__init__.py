"""Calls of tools as text: how models write them, how they are read back, forced, and told of in a prompt."""

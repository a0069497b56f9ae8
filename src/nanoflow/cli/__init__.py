"""The  command: argument parsing and printing only."""

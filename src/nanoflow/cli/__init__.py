"""The `nanoflow` command: argument parsing and printing only."""

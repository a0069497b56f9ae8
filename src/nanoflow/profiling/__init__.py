"""Measuring this machine: its rates, and (later) every operation alone and in pairs."""

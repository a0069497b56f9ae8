"""Turns Pipeline, model and device into launches and runs them, one batch plan after the other."""

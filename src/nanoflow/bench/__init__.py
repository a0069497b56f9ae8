"""Workloads, load generation, benchmarks and their results."""

"""The report: one HTML page with the figures of NanoFlow's evaluation, drawn from result files."""

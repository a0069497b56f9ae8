"""The Pipeline: which nano-operations a layer runs, in which order and on which lanes; plain data with validation. No torch."""

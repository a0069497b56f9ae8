"""The Pipeline: which nano-operations a layer runs, in which order, on which lanes; validated plain data. No torch."""

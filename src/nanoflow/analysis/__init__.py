"""What serving a model must cost on a machine: FLOPs, bytes and energy of every operation, and the bound they set. No torch."""

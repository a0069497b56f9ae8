"""What serving a model must cost on a machine: FLOPs, bytes and energy of every op, and the bound they set. No torch."""

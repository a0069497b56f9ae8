"""What serving a model must cost on a machine: FLOPs, bytes and energy of each op, and the bound they set. No torch."""

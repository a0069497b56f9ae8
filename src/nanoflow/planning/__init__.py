"""How many GPUs a request rate needs: the real scheduler in simulated time."""

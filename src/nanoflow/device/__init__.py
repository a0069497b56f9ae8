"""Devices, lanes and events: where launches are queued, on CPU threads or CUDA streams."""

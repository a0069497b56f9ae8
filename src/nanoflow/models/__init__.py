"""One decoder with its per-architecture differences, and weights from safetensors, GGUF or a seed."""

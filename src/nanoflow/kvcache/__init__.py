"""The paged KV cache: which pages exist, who owns them, and when they come back."""

"""Paged KV memory: who owns which page."""

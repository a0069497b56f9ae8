"""Weights under one set of names, whatever the file format, readable shard by shard."""

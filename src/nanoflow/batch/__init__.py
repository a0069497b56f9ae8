"""Batch jobs: a file of requests in, a file of answers out, through any kill. What answers is behind `Responder`."""

"""The serving engine: scheduler, asynchronous loop, sampling, and the composition root that builds it all."""

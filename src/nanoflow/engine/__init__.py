"""The engine: schedule a batch, launch it, retire the batch before."""

"""Readings of the machine and its GPUs; what cannot be read is left out and said."""

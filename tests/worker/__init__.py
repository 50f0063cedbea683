"""The documented worker interface from both sides, each written from the API reference alone."""

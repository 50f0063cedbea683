"""Makes a machine with SSH and Python a node."""

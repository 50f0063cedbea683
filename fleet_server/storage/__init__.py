"""Files: outputs on the local disk."""

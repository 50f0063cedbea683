"""A node without an agent: its steward runs here, and reaches it by SSH."""

"""Programs that callers run: on this node as the agent's user, or in a container."""

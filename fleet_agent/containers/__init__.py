"""Containers that the fleet runs on this node, through its Docker engine."""

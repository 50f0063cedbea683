"""Swarm services: this node's part where its Docker engine manages a swarm."""

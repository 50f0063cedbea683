"""Training and custom jobs as containers, on a Docker engine that the tests start."""

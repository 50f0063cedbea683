"""The REST servers that `bench/bridge.py` compares, each run as its own documentation advises."""

"""Callbacks, sent by the real sender to real receivers over real sockets."""

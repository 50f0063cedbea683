"""Tests on a real server, with the event loop that production runs on."""

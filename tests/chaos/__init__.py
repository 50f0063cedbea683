"""Faults in a running fleet, a recorded history and an offline checker of the invariants I1 to I8 (docs/chaos.md)."""

"""A day of five unequal GPUs in virtual time, over the very functions that dispatch calls.

The fleet, the workloads and the simple rules that ours is held against were committed before ours was tuned on them.
"""

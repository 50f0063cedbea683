"""Use cases: what callers and agents may do, on top of the store and the files."""

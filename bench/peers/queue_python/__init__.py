"""Python job queues for the benchmark, one program each, run in an environment of its own (the *.txt beside it)."""

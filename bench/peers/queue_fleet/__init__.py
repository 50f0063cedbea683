"""Our side of the queue benchmark: an engine that does nothing but note when its body began, and a producer."""

"""The example engine, installed as a package of its own and used through a whole fleet."""

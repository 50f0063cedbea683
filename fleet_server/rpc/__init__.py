"""The RPC doors: thin servicers, and the one chain (`invoke`) that every call of gRPC and REST passes."""

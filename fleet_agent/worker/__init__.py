"""`fleet worker`: the HTTP interface of an SDXL-TRT worker over any engine of this node, without a fleet."""

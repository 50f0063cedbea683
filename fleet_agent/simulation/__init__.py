"""A fleet of modelled GPUs in one process, against a real server over the real protocol: `fleet simulate`."""

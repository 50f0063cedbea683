"""Engines: what turns a job into files. `base` is the protocol a plug-in implements, `registry` finds them."""

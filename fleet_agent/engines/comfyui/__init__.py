"""`comfyui`: the node's ComfyUI as an engine.

`client` speaks to it, `templates` make graphs for jobs that bring none, `watch` follows one.
"""

"""The `openai` engine against a server that others wrote: `transformers serve`, with models of a few weights."""

"""`openai`: language models and transcription by any server on the node that speaks OpenAI's HTTP API."""

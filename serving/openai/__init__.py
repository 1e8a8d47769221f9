"""OpenAI's HTTP API: what is read, what is written, where. Imports neither Ray nor torch."""

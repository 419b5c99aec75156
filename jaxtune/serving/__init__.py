"""The HTTP server: OpenAI's requests and answers over the engine of `generation`."""

"""The engine behind HTTP: OpenAI-compatible endpoints, API keys, limits, and a router to several of them."""

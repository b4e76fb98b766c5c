"""Files and batches of OpenAI's API: the routes, and what runs them behind a protocol."""

"""The prompts that `make demo` runs: docstrings of the standard library, and a template around them."""

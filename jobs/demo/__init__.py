"""The prompts that `make demo` runs: docstrings of Python's standard library, and the template around them."""

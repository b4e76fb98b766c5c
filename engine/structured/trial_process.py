"""The process of `trials`: compiles grammars and says how it went. Run as a file; it imports nothing of ours.

A line in is JSON: first what the vocabulary and the limits are, then a grammar each. A line out is JSON:
the error of that grammar, empty where there is none. It ends with its input, so with the process that
started it.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from typing import Any

STACK_BYTES = 1 << 20
"""Less than any thread of the process that compiles in earnest has."""


def limit_memory(num_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # not POSIX: there the time alone is limited
        return
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def serve(begun: Mapping[str, Any]) -> None:
    """Answer line by line."""
    import llguidance

    if begun["tokenizer"] is None:
        vocabulary = llguidance.LLTokenizer("byte")
    else:
        vocabulary = llguidance.LLTokenizer(
            begun["tokenizer"], n_vocab=begun["vocab_size"], eos_token=begun["eos_token_ids"]
        )
    limits = llguidance.LLParserLimits(**begun["limits"])
    for line in sys.stdin:
        matcher = llguidance.LLMatcher(vocabulary, json.loads(line), log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        print(json.dumps(matcher.get_error()), flush=True)


if __name__ == "__main__":
    begin = json.loads(sys.stdin.readline())
    limit_memory(begin["memory_bytes"])
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=serve, args=(begin,))
    worker.start()
    worker.join()

"""Structured output: text that must follow a JSON schema, a regular expression, a choice or a grammar.

    StructuredOutput ──▶ CompiledGrammar ──▶ GrammarState ──▶ token mask
    spec, json_schemas     grammars             one a sample     engine/token_masks.py

What a request asks for is a value of its sampling (`spec`), compiled once under limits (`grammars`). Each
sample has a place of its own in the grammar, moved by the tokens that it drew and nothing else: n samples,
a preempted request and one that goes on from an earlier engine's tokens are all the same thing.
"""

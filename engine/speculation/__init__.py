"""Speculative decoding without a draft model: tokens that may come next are guessed from text that is there
already, and one step looks at all of them.

A draft costs the tokens of a longer row and changes no output. What a request draws at a position follows
from its logits there and from the key of (seed, row, sample, position), whether the token before was drawn
or guessed right; so a step draws at every drafted position with that position's own key, and what was
guessed is kept as long as it equals what is drawn (Leviathan et al. 2023, whose accept-or-resample rule is
not needed here: a draw is a function of its place).

    row of a step     [ last token | draft 0 | draft 1 | ... | draft k-1 )     k + 1 tokens, k + 1 draws
    draws               x0           x1        x2              xk
    kept                x0, and x(i+1) as long as draft 0 .. draft i are x0 .. xi

Where a draw depends on the tokens before it in other ways (penalties, bad words, masks), and where
log-probabilities are wanted, a request is not drafted; nor before its `min_tokens`.

`ngram` looks in the request's own prompt and output, `suffix_index` in finished outputs of the same template,
`policy` says when a draft pays, `drafter` keeps what is known of each request. No JAX here.
"""

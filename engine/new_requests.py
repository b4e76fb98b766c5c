"""From what a caller gives to the scheduler's requests: tokens checked, the engine's options applied."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.checkpoints import LoadedModel, has_chat_template, prompt_tokens
from engine.config import EngineConfig
from engine.context_rules import cut, fit_context
from engine.errors import ConfigError, RequestError
from engine.inputs import Chat, TokenIds, checked_tokens
from engine.message_parsing import Parsing
from engine.options import RequestOptions
from engine.presentation import Presentation
from engine.request import Request, request_key
from engine.request_group import bad_word_token_ids
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.structured.grammars import CompiledGrammar

_LOG = logging.getLogger("engine")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was read and can run, as far as anybody but the scheduler can say."""

    request_id: str
    token_ids: tuple[int, ...]
    tokens: bytes
    """The same, packed."""
    text: str | None
    """What it is told to have been asked: the prompt, where it was text."""
    sampling: SamplingParams
    """Of its caller, with what the engine's options add."""
    max_total_len: int
    shown: Presentation | None
    """What its caller sees; None: all there is."""

    @property
    def may_share(self) -> bool:
        """Whether its output may be that of another one that asks for the same."""
        return self.shown is None or (self.shown.num_cut == 0 and self.shown.parsing is None)


class NewRequests:
    """Reads requests for one model, as `EngineConfig` and `RequestOptions` say."""

    def __init__(
        self, loaded: LoadedModel, config: EngineConfig, options: RequestOptions, max_model_len: int
    ):
        """Raises ConfigError for options that do not go with the model."""
        self._tokenizer = loaded.tokenizer
        self._vocab_size = loaded.config.vocab_size
        self._seed = config.seed
        self._options = options
        self._max_model_len = max_model_len
        ends = (*loaded.config.eos_token_ids, *options.extra_eos_token_ids)
        self.eos_token_ids = frozenset(ends)
        if any(token >= self._vocab_size for token in ends):
            raise ConfigError(
                f"engine.extra_eos_token_ids={list(options.extra_eos_token_ids)}: the vocabulary has "
                f"{self._vocab_size} tokens"
            )
        if options.reserve_tokens + 2 > max_model_len:
            raise ConfigError(
                f"engine.reserve_tokens={options.reserve_tokens} leaves no room for a prompt and a token in "
                f"max_model_len={max_model_len}"
            )
        template = self._tokenizer.chat_template if has_chat_template(self._tokenizer) else None
        self._parsing = Parsing.choose(
            options.tool_parser,
            options.reasoning_parser,
            chat_template=template,
            model_type=loaded.config.architecture,
            stops_in_reasoning=not options.ignore_stop_strings_in_reasoning,
        )

    def read(
        self,
        request_id: str,
        token_ids: TokenIds | None,
        prompt: str | Chat | None,
        sampling: SamplingParams,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Asked:
        """Raises RequestError when it cannot run."""
        ids = prompt_tokens(self._tokenizer, request_id, token_ids, prompt)
        text = prompt if isinstance(prompt, str) else None
        sampling = self._with_options(request_id, sampling, text, ids)
        sampling.check_vocab(self._vocab_size)
        kept = ids
        if sampling.truncate_prompt_tokens is not None:
            kept = cut(ids, sampling.truncate_prompt_tokens, self._options.truncate_mode or "left")
        fitted = fit_context(request_id, kept, sampling.max_tokens, self._max_model_len, self._options)
        num_cut = len(ids) - len(fitted.token_ids)
        if num_cut:
            self._note_cut(request_id, len(ids), num_cut)
            if text is not None and self._options.decode_truncated_prompt:
                text = self._tokenizer.decode(list(fitted.token_ids), skip_special_tokens=False)
        parsing = self._parsing if self._parsing is None or not tools else self._parsing.with_tools(tools)
        hides = self._adds_logprobs(sampling) or sampling.num_samples > sampling.n
        return Asked(
            request_id=request_id,
            token_ids=fitted.token_ids,
            tokens=checked_tokens(request_id, fitted.token_ids, self._vocab_size),
            text=text,
            sampling=sampling,
            max_total_len=fitted.max_total_len,
            shown=Presentation(sampling, num_cut, parsing) if hides or num_cut or parsing else None,
        )

    def make(
        self,
        asked: Asked,
        identity: str,
        expected_output_len: int | None,
        grammar: CompiledGrammar | None,
        **same: Any,
    ) -> list[Request]:
        """The samples of a request, as the scheduler takes them; `same`: fields that all of them share."""
        if expected_output_len is not None and expected_output_len < 1:
            raise ValueError(f"expected_output_len is {expected_output_len}: give at least 1, or None")
        first = asked.sampling
        if self._adds_logprobs(first):
            first = first.replace(logprobs=0)
        # The samples share their prompt; its log-probabilities are computed once, with the first.
        others = first if first.prompt_logprobs is None else first.replace(prompt_logprobs=None)
        bad_words = bad_word_token_ids(self._tokenizer, first.bad_words)
        prompt_len = len(asked.token_ids)
        return [
            Request(
                request_id=asked.request_id,
                prompt_token_ids=asked.token_ids,
                packed_prompt=asked.tokens,
                sampling=others if index else first,
                key=request_key(self._seed, identity, index, first.seed),
                max_total_len=asked.max_total_len,
                sample_index=index,
                eos_token_ids=self.eos_token_ids,
                bad_words_token_ids=bad_words,
                grammar=None if grammar is None else grammar.begin(),
                expected_len=None if expected_output_len is None else prompt_len + expected_output_len,
                **same,
            )
            for index in range(first.num_samples)
        ]

    def _with_options(
        self, request_id: str, sampling: SamplingParams, text: str | None, ids: tuple[int, ...]
    ) -> SamplingParams:
        """Sampling with what the engine's options change."""
        callback: Callable[..., Any] | None = self._options.sampling_params_callback
        if callback is not None:
            facts = {"request_id": request_id, "prompt": text, "prompt_token_ids": ids}
            changed = callback(sampling, facts)
            if not isinstance(changed, (SamplingParams, type(None))):
                raise RequestError(
                    "bad_sampling",
                    f"request {request_id!r}: sampling_params_callback gave a {type(changed).__name__}: it "
                    "must give SamplingParams, or None to change nothing",
                )
            sampling = (changed or sampling).replace(extra_args=())
        elif sampling.extra_args:
            raise RequestError(
                "bad_sampling",
                "sampling.extra_args is for the engine's sampling_params_callback, and this engine has none",
            )
        extra = self._options.extra_stops
        return sampling.replace(stop=(*sampling.stop, *extra)) if extra else sampling

    def _adds_logprobs(self, sampling: SamplingParams) -> bool:
        """Whether it runs with log-probabilities that its caller did not ask for."""
        wanted = self._options.sampler_metrics or sampling.num_samples > sampling.n
        return wanted and sampling.logprobs is None

    def _note_cut(self, request_id: str, num_tokens: int, num_cut: int) -> None:
        if not self._options.silent_mode:
            _LOG.warning("request %r: %d of its prompt's %d tokens were cut", request_id, num_cut, num_tokens)

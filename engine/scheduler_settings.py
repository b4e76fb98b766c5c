"""What a scheduler may use, and what it reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from engine.config import EngineConfig
from engine.errors import ConfigError, RequestError
from engine.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """Capacities of one scheduler. Raises ConfigError when they cannot work together."""

    max_num_seqs: int
    """Requests that run at once, and logits that one step may ask for, without those of drafts."""
    max_num_batched_tokens: int
    """Tokens that one step may compute."""
    max_model_len: int
    page_size: int
    num_pages: int
    policy: str = "fcfs"
    """"fcfs", or "priority": lower `Request.priority` first, then age."""
    aging_steps: int | None = None
    """Under the priority policy, how many steps of waiting weigh as much as one unit of priority; None: none
    do, and a request may wait for ever."""
    enable_prefix_caching: bool = True
    max_cached_pages: int | None = None
    """Most pages that are kept for what they hold while no request holds them; None: all that are left."""
    long_prefill_token_threshold: int | None = None
    """Most tokens of one request in one step, so that a long prompt leaves room for others."""
    speculation: str = "off"
    """Where drafts come from (engine/speculation): "off", "ngram", "suffix" or "auto"."""
    max_draft_len: int = 8
    """Most tokens drafted for a row."""
    num_draft_logits: int = 0
    """Logits that one step may ask for beyond `max_num_seqs`."""
    min_shared_tokens: int = 8
    """Most prompts have a token or two in common: fewer than these are not copied at the start of a prompt,
    nor waited for while another request computes them."""

    def __post_init__(self) -> None:
        names = ("max_num_seqs", "max_num_batched_tokens", "page_size", "num_pages", "min_shared_tokens")
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.max_model_len < 2:
            raise ConfigError(f"max_model_len is {self.max_model_len}: a prompt and one new token need 2")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}: it must be at least max_num_seqs "
                f"({self.max_num_seqs}), or running requests would wait for one another"
            )
        if self.policy not in ("fcfs", "priority"):
            raise ConfigError(f"policy is {self.policy!r}: it must be 'fcfs' or 'priority'")
        if self.aging_steps is not None and self.aging_steps < 1:
            raise ConfigError(f"aging_steps is {self.aging_steps}: it must be at least 1 or absent")
        if self.long_prefill_token_threshold is not None and self.long_prefill_token_threshold < 1:
            raise ConfigError(
                f"long_prefill_token_threshold is {self.long_prefill_token_threshold}: it must be at least 1 "
                "or absent"
            )

    @classmethod
    def of(cls, config: EngineConfig, max_model_len: int, num_pages: int) -> SchedulerSettings:
        """Those of an engine with this config."""
        return cls(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=max_model_len,
            page_size=config.page_size,
            num_pages=num_pages,
            policy=config.scheduling_policy,
            aging_steps=config.priority_aging_steps,
            enable_prefix_caching=config.enable_prefix_caching,
            max_cached_pages=config.max_cached_pages(num_pages),
            long_prefill_token_threshold=config.long_prefill_token_threshold,
            speculation=config.speculation,
            max_draft_len=config.max_draft_len,
            num_draft_logits=config.num_draft_logits,
        )

    def rank(self, request: Request) -> tuple[int, int]:
        """Who comes first: the lowest. It never changes, so that who is first stays first: ageing is that
        what comes later is placed behind, not that what waits is moved."""
        if self.policy == "fcfs":
            return 0, request.arrival
        if self.aging_steps is None:
            return request.priority, request.arrival
        return request.priority * self.aging_steps + request.arrival_step, request.arrival

    def outranks(self, request: Request, other: Request) -> bool:
        """Whether a request may take the seat and the pages of another that runs: it is more urgent, and the
        other one has not waited longer than that is worth."""
        return request.priority < other.priority and self.rank(request) < self.rank(other)

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def check(self, request: Request) -> None:
        """Raises RequestError, with the numbers, when the request could never run whatever else does."""
        prompt_len, num_pages = request.prompt_len, self.num_pages_for(request.max_total_len)
        if 0 < prompt_len < request.max_total_len <= self.max_model_len and num_pages <= self.num_pages:
            return
        name = f"request {request.request_id!r}"
        if prompt_len == 0:
            raise RequestError("empty_prompt", f"{name} has a prompt of 0 tokens: it needs at least 1")
        if prompt_len + 1 > self.max_model_len:
            raise RequestError(
                "prompt_too_long",
                f"{name} has a prompt of {prompt_len} tokens: with one new token it exceeds max_model_len, "
                f"{self.max_model_len}; shorten or truncate it",
            )
        if not prompt_len < request.max_total_len <= self.max_model_len:
            raise ValueError(
                f"{name} has max_total_len {request.max_total_len}: it must be above its prompt's length, "
                f"{prompt_len}, and at most max_model_len, {self.max_model_len}"
            )
        raise RequestError(
            "request_too_large",
            f"{name} may grow to {request.max_total_len} tokens, {num_pages} pages of {self.page_size}, "
            f"and there are {self.num_pages}: lower max_tokens or give the KV cache more memory",
        )


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts since the start, and where the pages are now."""

    num_waiting: int
    num_running: int
    num_preemptions: int
    num_prefix_queries: int
    """Prompt tokens looked up in the prefix cache, each request counted at its first admission."""
    num_prefix_hits: int
    """Those of them that were found."""
    num_free_pages: int
    num_cached_pages: int
    num_held_pages: int
    num_evictions: int
    num_generated_tokens: int
    """Drawn for requests that had not ended before."""
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    """Of the drafted tokens, those that were drawn."""

    @classmethod
    def total(cls, each: Sequence[SchedulerStats]) -> SchedulerStats:
        """The sums over several schedulers."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: sum(getattr(stats, name) for stats in each) for name in names})

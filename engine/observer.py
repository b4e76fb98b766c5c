"""Who looks on at an engine: told of requests and steps as they happen, on the thread that steps it.

An engine without observers pays a truth test for each of these moments, and nothing is put together for
nobody. Observers change nothing: the tokens are the same with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.monitoring.monitor import Monitoring
    from engine.outputs import RequestOutput
    from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class StepFacts:
    """One step whose results have come back. Times are monotonic seconds."""

    num_sequences: int
    """Rows of the step, each of one sequence."""
    num_tokens: int
    """Tokens that it computed, of prompts and drawn before."""
    execution_seconds: float
    """Until its results were back, from its dispatch or from the results of the step before it, whichever
    came later: steps overlap, and these add up to the time that the device was in use."""
    ended_at: float


class EngineObserver:
    """Base of observers: each overrides what it wants to know. Calls come from the stepping thread, must be
    quick, and what they raise ends the step.
    """

    def on_added(self, request_id: str, num_prompt_tokens: int, sampling: SamplingParams) -> None:
        """A request was queued (or will be given the result of an identical one)."""

    def on_scheduled(self, seconds: float) -> None:
        """The next step was planned, which took this long."""

    def on_step(self, facts: StepFacts) -> None:
        """A step is over; the requests that ended with it are told of next."""

    def on_finished(self, output: RequestOutput) -> None:
        """A request is finished. Reading a text here would have it made in the engine's time."""

    def on_aborted(self, request_id: str) -> None:
        """A request was dropped; no output comes of it."""


class Observed:
    """What an engine needs to be looked at: the list of observers, and the calls that tell them."""

    observers: list[EngineObserver]
    _monitoring: Monitoring | None = None

    def start_monitoring(self, **options: Any) -> Monitoring:
        """Serve this engine's metrics, the console or the dashboard until `stop_monitoring`: see
        `engine.monitoring.monitor.start_monitoring` for the options. Raises ConfigError when it is monitored
        already, or where a port is in use.
        """
        from engine.errors import ConfigError
        from engine.monitoring.monitor import start_monitoring

        if self._monitoring is not None and not self._monitoring.is_closed:
            raise ConfigError("this engine is monitored already: call stop_monitoring() first")
        self._monitoring = start_monitoring(self, **options)
        return self._monitoring

    def stop_monitoring(self) -> None:
        """Undo `start_monitoring`; nothing is to be done where it was not called."""
        if self._monitoring is not None:
            self._monitoring.close()
            self._monitoring = None

    def add_observer(self, observer: EngineObserver) -> None:
        """From any thread: the list is replaced, and a step that goes through the old one finishes so."""
        self.observers = [*self.observers, observer]

    def remove_observer(self, observer: EngineObserver) -> None:
        """Likewise. Nothing is to be done for one that is not there."""
        self.observers = [each for each in self.observers if each is not observer]

    def _tell_added(self, request_id: str, num_prompt_tokens: int, sampling: SamplingParams) -> None:
        for observer in self.observers:
            observer.on_added(request_id, num_prompt_tokens, sampling)

    def _tell_aborted(self, request_id: str) -> None:
        for observer in self.observers:
            observer.on_aborted(request_id)

    def _tell_scheduled(self, seconds: float) -> None:
        for observer in self.observers:
            observer.on_scheduled(seconds)

    def _tell_step(self, plan: Any, seconds: float, now: float, outputs: Sequence[RequestOutput]) -> None:
        facts = StepFacts(plan.num_rows, plan.num_tokens, seconds, now)
        for observer in self.observers:
            observer.on_step(facts)
        for output in outputs:
            if output.finished:
                self._tell_finished(output)

    def _tell_finished(self, output: RequestOutput) -> None:
        for observer in self.observers:
            observer.on_finished(output)

"""What is done to an engine while it lives: other weights, another model, a pause, a profile, a look back."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoints import LoadedModel
from engine.checkpoints import load as load_model
from engine.config import EngineConfig
from engine.errors import ConfigError, TidemillError
from engine.options import Options, RequestOptions
from engine.outputs import RequestOutput
from engine.profiling import Profile
from engine.request_control import RequestControl
from engine.sampler_meter import SamplerMeter, SamplerStats
from engine.start import model_for

if TYPE_CHECKING:
    from engine.weights_update import NewWeights

_LOG = logging.getLogger("engine")


class Upkeep(RequestControl):
    """The part of an `Engine` for who keeps it running. Its thread is the engine's."""

    config: EngineConfig
    options: RequestOptions
    model_config: Any
    model_name: str
    num_pages: int
    _runner: Any
    _lockstep: Any
    _collected_at: float
    _profile: Profile | None = None
    _lost: str | None = None
    """Why it has no model any more."""

    def _begin(self, loaded: LoadedModel, runner: Any, *, takes_weights: bool) -> None:
        raise NotImplementedError

    def _begin_upkeep(self) -> None:
        options = self.options
        self._sampler_meter = SamplerMeter() if options.sampler_metrics else None
        self._recent: OrderedDict[str, RequestOutput] = OrderedDict()
        self._notes_steps = options.max_request_outputs > 0
        self._lost = None
        self._log("engine %r: %s, %d pages of %d tokens", self.esurge_name, self._runner.device_name,
                  self.num_pages, self.config.page_size)  # fmt: skip

    @property
    def esurge_name(self) -> str:
        """The engine's name: what it was given, or the model's."""
        return self.model_name

    # -- other weights, another model ----------------------------------------------------------------

    def update_model_weights(self, new: NewWeights | str, *, takes_weights: bool = False) -> None:
        """Run other weights of the same sizes from the next step on: no restart, nothing is compiled.

        Unfinished requests go on: they keep what they have drawn, and what the old weights computed of them
        is computed anew. Cached prefixes are forgotten.

        Args:
            new: a loaded model or its modules, where `checkpoints.load` finds one, or arrays by their Hugging
                Face names.
            takes_weights: as in `Engine`.

        Raises:
            ModelError: they do not fit, or cannot be read; the old ones still run.
        """
        from engine.weights_update import weights_for

        self._check_alone("update_model_weights")
        dtype = self._runner.model_dtype
        if isinstance(new, str):
            new, takes_weights = load_model(new, dtype=dtype), True
        weights = weights_for(new, self.model_config, dtype)
        self._end_step()
        self._runner.replace_weights(weights, takes_weights=takes_weights)
        self._scheduler.preempt_all()
        self._scheduler.forget_prefixes()

    def swap_model(
        self,
        model: LoadedModel | str,
        *,
        tokenizer: Any = None,
        revision: str | None = None,
        frees_first: bool | None = None,
    ) -> None:
        """Run another model, of any sizes and architecture, with the same options and no new process.

        Args:
            model, tokenizer, revision: as in `Engine`.
            frees_first: give the old model's memory back before the new one takes its own: if that then
                fails, the engine has no model until another swap. None: so on accelerators, whose memory
                rarely holds two; not on a CPU.

        Raises:
            ConfigError: requests are unfinished, for their tokens mean nothing to another model; or the
                options do not go with it.
            ModelError: it cannot be loaded; the old one still runs.
        """
        self._check_alone("swap_model")
        if self._groups or self._ready:
            raise ConfigError(
                f"{len(self._groups)} requests are unfinished and belong to {self.model_name!r}: finish or "
                "abort them before another model takes its place"
            )
        self._end_step()
        told = Options(self.config, self.options, frozenset({"dtype"}))
        loaded, _ = model_for(model, tokenizer, revision, told, is_whole=True)
        if self._runner is not None and frees_first is None:
            frees_first = not self._runner.device_name.startswith("cpu")
        if self._runner is not None and frees_first:
            self._lost = f"the engine lost {self.model_name!r} to a swap that failed: call swap_model again"
            self._runner.drop_pages()
            self._runner = None
        try:
            self._begin(loaded, None, takes_weights=isinstance(model, str))
        except TidemillError as error:
            self._log("swapping to %r failed: %s", loaded.name, error)
            raise

    def _check_alone(self, call: str) -> None:
        if self._lockstep is not None:
            raise ConfigError(f"{call} is for an engine of one process: start the processes anew instead")
        if self._lost is not None and call != "swap_model":
            raise ConfigError(self._lost)

    def _check_takes_requests(self) -> None:
        if self._lockstep is not None and not self._lockstep.leads:
            raise ConfigError("only process 0 takes requests: call Engine.follow() in the others")
        if self._lost is not None:
            raise ConfigError(self._lost)

    # -- pause ---------------------------------------------------------------------------------------

    def pause(self) -> None:
        """As `RequestControl.pause`; with `destroy_pages_on_pause` the device has the memory of all pages
        back, and nothing is cached afterwards."""
        if self.is_paused:
            return
        super().pause()
        if self.options.destroy_pages_on_pause:
            self._scheduler.forget_prefixes()
            self._runner.drop_pages()

    def resume(self) -> None:
        """Undo `pause`."""
        self._runner.make_pages()
        super().resume()

    # -- looks ---------------------------------------------------------------------------------------

    def start_profiling(self, output_dir: str | Path, num_steps: int | None = None) -> None:
        """Have JAX's profiler write what host and device do into a folder, for TensorBoard or Perfetto, until
        `stop_profiling`, or for `num_steps` steps. Raises ConfigError where one is being written."""
        if self._profile is not None and self._profile.is_running:
            raise ConfigError("a profile is being written: call stop_profiling() first")
        self._profile = Profile(output_dir, num_steps)
        self._notes_steps = True

    def stop_profiling(self) -> Path:
        """End `start_profiling`; the folder. Raises ConfigError where there was none."""
        if self._profile is None:
            raise ConfigError("no profile is being written: call start_profiling(folder) first")
        folder, self._profile = self._profile.stop(), None
        self._notes_steps = self.options.max_request_outputs > 0
        return folder

    def request_output(self, request_id: str) -> RequestOutput | None:
        """The output of a request that finished, if it is among the last `max_request_outputs`."""
        return self._recent.get(request_id)

    def sampler_stats(self) -> SamplerStats:
        """How likely the tokens were that requests drew, those that have finished since the last call. Raises
        ConfigError unless the engine has `sampler_metrics`."""
        if self._sampler_meter is None:
            raise ConfigError("the engine keeps no count of its draws: make it with sampler_metrics=True")
        return self._sampler_meter.take()

    def _note_step(self, outputs: Sequence[RequestOutput]) -> None:
        """A step has ended, with these outputs."""
        for output in outputs if self.options.max_request_outputs else ():
            if output.finished:
                self._recent[output.request_id] = output
                self._recent.move_to_end(output.request_id)
        while len(self._recent) > self.options.max_request_outputs:
            self._recent.popitem(last=False)
        if self._profile is not None:
            self._profile.note_step()

    def _see_idleness(self, now: float) -> None:
        """A request comes: if nothing was to be done for long enough, cached prefixes are forgotten."""
        seconds = self.options.idle_reset_seconds
        if seconds is not None and not self._groups and now - self._collected_at >= seconds:
            self._scheduler.forget_prefixes()

    def _end_step(self) -> None:
        """Take back the step in flight; its outputs come with the next `step`."""
        step, self._in_flight = self._in_flight, None
        if step is not None:
            self._ready += self._take_back(step)

    def _log(self, text: str, *values: object) -> None:
        if not self.options.silent_mode:
            _LOG.info(text, *values)

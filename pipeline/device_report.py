"""What `mode=plan` says of the chips a job is planned for: as JSON values, and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from engine.device_plan import DevicePlan
from engine.topology_compile import CompiledStep
from pipeline.device_estimate import DeviceEstimate, PlannedStep
from pipeline.progress import duration

_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """compiled: what the compiler said, none where it is not there; not_compiled: why, in one line."""

    plan: DevicePlan
    steps: Sequence[PlannedStep]
    compiled: Sequence[CompiledStep] = field(default=())
    not_compiled: str | None = None
    estimate: DeviceEstimate | None = None

    @property
    def would_fit(self) -> list[tuple[str, DevicePlan]]:
        """Changes that help where it does not fit."""
        return [] if self.plan.fits else list(self.plan.what_would_fit())

    def refusal(self) -> str | None:
        """What a run would be refused with; None when the model fits."""
        plan = self.plan
        if plan.fits:
            return None
        needed = plan.weight_bytes + plan.temporary_bytes
        sequence = -(-plan.max_model_len // plan.config.page_size) * plan.page_bytes
        return (
            f"the model does not fit on {plan.topology.name}: a device has {plan.budget_bytes / _GIB:.2f} "
            f"GiB for it; weights and temporaries take {needed / _GIB:.2f} and one sequence of "
            f"{plan.max_model_len:,} tokens {sequence / _GIB:.2f}. "
            f"{self._remedy()}"
        )

    def _remedy(self) -> str:
        if self.would_fit:
            return "It would fit with " + ", or ".join(change for change, _ in self.would_fit)
        return f"At most {_billions(self.plan.largest_num_parameters)} parameters of this shape would fit"

    def as_json(self) -> dict[str, Any]:
        plan = self.plan
        compiler = {"tpu": "libtpu", "gpu": "jax-cuda12-plugin"}[plan.topology.chip.platform]
        return {
            "topology": plan.topology.name,
            "chips": plan.topology.num_chips,
            "devices": plan.topology.num_devices,
            "mesh": plan.mesh,
            "replicas": plan.num_replicas,
            "parameters": plan.num_parameters,
            "weight_format": plan.config.weight_format,
            "kv_dtype": plan.config.page_dtype,
            "fits": plan.fits,
            "bytes_per_device": {
                "usable": plan.topology.usable_bytes,
                "budget": plan.budget_bytes,
                "weights": plan.weight_bytes,
                "temporaries": plan.temporary_bytes,
                "kv": plan.kv_bytes,
                "page": plan.page_bytes,
            },
            "temporaries_are": "estimated" if plan.is_estimate else "compiled",
            "not_compiled": self.not_compiled,
            "compiler": f"{compiler} {version(compiler)}" if self.compiled else None,
            "pages": plan.num_pages,
            "concurrent_tokens": plan.num_tokens * plan.num_replicas,
            "max_model_len": plan.max_model_len,
            "sequences_of_full_length": plan.num_tokens // plan.max_model_len * plan.num_replicas,
            "largest_context": plan.largest_context,
            "largest_layers": plan.largest_num_layers,
            "largest_parameters": plan.largest_num_parameters,
            "would_fit": [
                {
                    "change": change,
                    "pages": found.num_pages,
                    "concurrent_tokens": found.num_tokens * found.num_replicas,
                }
                for change, found in self.would_fit
            ],
            "steps": [self._step_json(step) for step in self.steps],
            "estimate": None if self.estimate is None else asdict(self.estimate),
        }

    def _step_json(self, step: PlannedStep) -> dict[str, Any]:
        found = self._compiled_of(step)
        return {
            "tokens": step.bucket.num_tokens,
            "logits": step.bucket.num_logits,
            "sequences": step.load.num_sequences,
            "compute_seconds": step.time.compute,
            "memory_seconds": step.time.memory,
            "interconnect_seconds": step.time.interconnect,
            "roofline_seconds": step.time.seconds,
            "bound": step.time.bound,
            "compiled": None if found is None else asdict(found),
        }

    def _compiled_of(self, step: PlannedStep) -> CompiledStep | None:
        """The last one compiled of a bucket is that for the pages that fit."""
        same = (each for each in self.compiled if (each.num_tokens, each.num_logits) == step.bucket)
        return max(same, key=lambda each: each.num_pages, default=None)

    def lines(self) -> list[str]:
        """For people, after the lines about the rows."""
        plan = self.plan
        topology, chip = plan.topology, plan.topology.chip
        each = "chip" if chip.devices == 1 else "half a chip (a device)"
        source = "an estimate by formula" if plan.is_estimate else "as compiled"
        found = [
            "",
            f"  chips     {topology.name}: {topology.num_chips} x {chip.name}, "
            f"{topology.usable_bytes / _GIB:.2f} GiB a {each}, of which "
            f"{plan.budget_bytes / _GIB:.2f} may be used",
            f"  model     {_billions(plan.num_parameters)} parameters, weights in "
            f"{plan.config.weight_format}, {self._spread()}",
            f"  memory    a {each}: weights {plan.weight_bytes / _GIB:.2f} GiB, temporaries "
            f"{plan.temporary_bytes / _GIB:.2f} ({source}), keys and values {plan.kv_bytes / _GIB:.2f}",
        ]
        if plan.fits:
            of_each = "" if plan.num_replicas == 1 else f", in each of {plan.num_replicas} replicas"
            found.append(
                f"  pages     {plan.num_pages:,} of {plan.config.page_size} tokens: {plan.num_tokens:,} "
                f"tokens at a time, {plan.num_tokens // plan.max_model_len:,} sequences of "
                f"{plan.max_model_len:,}{of_each}"
            )
        else:
            found.append(f"  pages     DOES NOT FIT. {self._remedy()}")
        found.append(
            f"  largest   context {plan.largest_context:,} tokens; model of this shape "
            f"{plan.largest_num_layers} layers, {_billions(plan.largest_num_parameters)} parameters"
        )
        if self.not_compiled is not None:
            found.append(f"  compiled  no step: {self.not_compiled}")
        return [*found, *self._step_lines(), *self._time_lines()]

    def _spread(self) -> str:
        """Over how many devices a model is spread, and along which axes."""
        num_used, num_devices = math.prod(self.plan.mesh.values()), self.plan.topology.num_devices
        used = f"{num_used}" if num_used == num_devices else f"{num_used} of {num_devices}"
        axes = "".join(f" {axis}={size}" for axis, size in self.plan.mesh.items() if size > 1)
        return f"on {used} devices:{axes}" if axes else f"on {used} device{'' if used == '1' else 's'}"

    def _step_lines(self) -> list[str]:
        found = [
            f"  steps     least milliseconds (roofline) at {self.steps[0].load.context:,.0f} tokens "
            "a sequence",
            f"            {'tokens':>7} {'logits':>7} {'sequences':>9} {'compute':>9} {'memory':>9} "
            f"{'links':>9} {'step':>9}  bound         temporaries",
        ]
        for step in self.steps:
            time, compiled = step.time, self._compiled_of(step)
            temporaries = "" if compiled is None else f"{compiled.temporary_bytes / 2**20:>8,.0f} MiB"
            found.append(
                f"            {step.bucket.num_tokens:>7,} {step.bucket.num_logits:>7,} "
                f"{step.load.num_sequences:>9,} {time.compute * 1e3:>9.3f} {time.memory * 1e3:>9.3f} "
                f"{time.interconnect * 1e3:>9.3f} {time.seconds * 1e3:>9.3f}  "
                f"{time.bound:<12} {temporaries}".rstrip()
            )
        return found

    def _time_lines(self) -> list[str]:
        if self.estimate is None:
            return []
        found = self.estimate
        price = "" if found.cost is None else f", {found.cost:,.2f} at plan.price_per_chip_hour"
        return [
            f"  time      at least {duration(found.seconds)} if every row generates its max_tokens: "
            f"{found.num_steps:,} steps of {found.running * self.plan.num_replicas:,} sequences; "
            f"{found.chip_hours:,.2f} chip hours{price}"
        ]


def _billions(number: int) -> str:
    return f"{number / 1e9:,.2f} billion" if number >= 1e8 else f"{number / 1e6:,.1f} million"

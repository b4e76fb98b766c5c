"""The part of `mode=plan` about chips that need not be here: what fits, the steps, hours and cost."""

from __future__ import annotations

import sys
from dataclasses import replace

from engine.chips import find_slice
from engine.device_plan import DevicePlan, plan_device
from engine.models.config import ModelConfig
from engine.topology_compile import CompiledStep, compile_steps, why_not_compiled
from pipeline.device_estimate import Work, estimate, planned_steps
from pipeline.device_report import DeviceReport
from pipeline.settings import Settings


def plan_chips(settings: Settings, model: ModelConfig) -> DevicePlan | None:
    """What of the model fits on the chips of `plan.topology`; None when none are named."""
    if settings.plan.topology is None:
        return None
    length = settings.engine.model_len(model.max_position_embeddings)
    return plan_device(model, settings.engine, find_slice(settings.plan.topology), length)


def report_chips(settings: Settings, plan: DevicePlan, work: Work | None) -> DeviceReport:
    """Compile what is to be compiled, saying so as it goes, and put everything together."""
    not_compiled = "plan.compile=none" if settings.plan.compile == "none" else why_not_compiled(plan)
    compiled = [] if not_compiled else _compile(settings, plan)
    if compiled:
        plan = replace(
            plan, temporary_bytes=max(each.temporary_bytes for each in compiled), is_estimate=False
        )
    least = None
    if work is not None and plan.fits:
        least = estimate(
            plan,
            work,
            roofline_share=settings.plan.roofline_share,
            price_per_chip_hour=settings.plan.price_per_chip_hour,
        )
    return DeviceReport(
        plan=plan,
        steps=planned_steps(plan, work),
        compiled=compiled,
        not_compiled=not_compiled,
        estimate=least,
    )


def _compile(settings: Settings, plan: DevicePlan) -> list[CompiledStep]:
    found = []
    for step in compile_steps(plan, only_largest=settings.plan.compile == "largest"):
        found.append(step)
        if settings.progress != "off":
            print(
                f"compiled for {plan.topology.chip.name}: {step.num_tokens:,} tokens, {step.num_logits:,} "
                f"logits, {step.num_pages:,} pages, in {step.compile_seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return found

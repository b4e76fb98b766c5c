"""Which kernels a step runs, and what it costs when the best ones are not there."""

from __future__ import annotations

from typing import Any, NamedTuple

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.group_costs import device_keys
from kernels.cpu import isa_name, native_library, why_absent
from kernels.paged_attention import ACCELERATOR_PAGE_DTYPES

# On two cores with AVX2; ARCHITECTURE.md has the figures.
_XLA_COST = "about half the speed"

# Kernels of attention that are made for one platform, by that platform as JAX names it.
_PLATFORM_KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


class Backends(NamedTuple):
    """The backend of each kind of kernel, as `kernels.*.available_backends()` name them."""

    attention: str
    linear: str
    """Of the products with weights, and of drawing tokens."""

    @classmethod
    def choose(cls, config: EngineConfig, platform: str) -> Backends:
        """The options' choice on `platform` ("cpu", "gpu", "tpu").

        "auto" is the native library on a CPU that has it; on a TPU or GPU its own kernels for attention; and
        XLA elsewhere. Raises ConfigError when a backend is asked for by name that is not there, or pages that
        it cannot read.
        """
        has_library = platform == "cpu" and native_library() is not None
        best = dict.fromkeys(cls._fields, "cpu" if has_library else "xla")
        best["attention"] = _PLATFORM_KERNELS.get(platform, best["attention"])
        asked = {"attention": config.attention_backend, "linear": config.linear_backend}
        for name, choice in asked.items():
            if choice == "cpu" and not has_library:
                reason = why_absent() or "JAX does not run on a CPU here"
                raise ConfigError(f"engine.{name}_backend=cpu: {reason}, or choose auto")
            if choice in _PLATFORM_KERNELS.values() and choice != _PLATFORM_KERNELS.get(platform):
                wanted = choice.removeprefix("pallas_").upper()
                raise ConfigError(
                    f"engine.{name}_backend={choice}: JAX runs on {platform}, not on a {wanted}; choose auto"
                )
        chosen = cls(**{name: best[name] if choice == "auto" else choice for name, choice in asked.items()})
        if (
            config.page_dtype in ACCELERATOR_PAGE_DTYPES
            and chosen.attention not in _PLATFORM_KERNELS.values()
        ):
            raise ConfigError(
                f"engine.kv_dtype={config.page_dtype}: only kernels for TPUs and GPUs read such pages, "
                f"and attention here is by {chosen.attention}; choose int8"
            )
        return chosen

    @property
    def skips_padding(self) -> bool:
        """Padding rows of a step cost nothing that counts: attention, products and draws leave them out."""
        return self.attention == self.linear == "cpu"

    def device_keys(self, device: Any) -> tuple[str, ...]:
        """Under which names constants of attention on this JAX device are kept."""
        return device_keys(device.platform, device.device_kind, self.attention, isa_name())

    def describe(self) -> str:
        """One line: what runs, and what is lost where it is not the best."""
        if self.attention == self.linear == "cpu":
            return f"native CPU kernels ({isa_name()})"
        if "cpu" in self:
            return f"attention by {self.attention}, products by {self.linear} (cpu: {isa_name()})"
        for platform, kernel in _PLATFORM_KERNELS.items():
            if self.attention == kernel:
                return f"attention by {platform.upper()} kernels, products by {self.linear}"
        absent = why_absent()
        if absent is not None:
            return f"XLA's own code on a CPU, {_XLA_COST} of the native kernels: {absent}"
        return "XLA's own code"

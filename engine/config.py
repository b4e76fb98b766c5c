"""The engine's options, validated when made; each one changes what the engine does."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ConfigError

DTYPES = ("float32", "bfloat16")
KV_DTYPES = (*DTYPES, "int8")
WEIGHT_DTYPES = (*DTYPES, "int8", "int4")
CPU_KV_CACHE_BYTES = 2 << 30
"""The default byte budget of the KV cache on a CPU, where no device memory bounds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of one engine. Raises ConfigError naming the option, its value and what it may be."""

    max_model_len: int | None = None
    """Prompt and output tokens of a request together; None: what the model was made for."""
    max_num_seqs: int = 256
    """Sequences that run at once."""
    max_num_batched_tokens: int = 1024
    """Tokens one step may compute, at least `max_num_seqs`."""
    page_size: int = 64
    """Tokens a KV page holds, a power of two from 8 to 512."""
    hbm_utilization: float = 0.85
    """Share of the device's memory that weights, compiled steps and KV pages may take together."""
    kv_cache_bytes: int | None = None
    """Bytes for KV pages instead of a share; None on a CPU: 2 GiB."""
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    """"fcfs", or "priority": lower `priority` first, then age."""
    long_prefill_token_threshold: int | None = None
    """Most tokens of one request in one step."""
    async_scheduling: bool = True
    """Plan and start each step while the one before it still runs; False: one after the other."""
    dtype: str = "float32"
    """Of weights and activations."""
    kv_dtype: str | None = None
    """Of the KV pages; None: `dtype`. "int8" has a scale for each token and head."""
    seed: int = 0
    """The run's seed: with a request's identity it makes the random key of its draws."""
    weight_dtype: str | None = None
    """Of the matrices: "int8" and "int4" quantise them at the start, and activations within each product;
    None: `dtype`."""
    attention_backend: str = "auto"
    """"cpu" is the native library, "pallas_tpu" and "pallas_gpu" the kernels for TPUs and GPUs, "xla" XLA's
    code; "auto" takes the library on a CPU that has it, and the kernels on their chips."""
    linear_backend: str = "auto"
    """The same for products with weights and for drawing tokens."""
    platform: str = "auto"
    compilation_cache_dir: str | None = None
    """Where compiled steps are kept between starts; None: `~/.cache/tidemill/compiled`."""
    min_token_pad: int = 16
    """The smallest step that is compiled, a power of two from 8: fewer tokens are padded up to it."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            self._check_integer(name, getattr(self, name), 1, 1 << 20)
        for name in ("max_model_len", "kv_cache_bytes", "long_prefill_token_threshold"):
            if getattr(self, name) is not None:
                self._check_integer(name, getattr(self, name), 2 if name == "max_model_len" else 1, 1 << 50)
        self._check_integer("seed", self.seed, 0, 2**63 - 1)
        for name, low, high in (("page_size", 8, 512), ("min_token_pad", 8, 1024)):
            value = self._check_integer(name, getattr(self, name), low, high)
            if value & (value - 1):
                raise ConfigError(f"engine.{name}={value}: give a power of two from {low} to {high}")
        if not isinstance(self.hbm_utilization, (int, float)) or not 0 < self.hbm_utilization <= 1:
            raise ConfigError(
                f"engine.hbm_utilization={self.hbm_utilization}: give a share above 0 and up to 1"
            )
        for name, choices in (
            ("dtype", DTYPES),
            ("kv_dtype", (None, *KV_DTYPES)),
            ("scheduling_policy", ("fcfs", "priority")),
            ("weight_dtype", (None, *WEIGHT_DTYPES)),
            ("attention_backend", ("auto", "cpu", "xla", "pallas_tpu", "pallas_gpu")),
            ("linear_backend", ("auto", "cpu", "xla")),
            ("platform", ("auto", "cpu", "gpu", "tpu")),
        ):
            if getattr(self, name) not in choices:
                known = ", ".join(str(choice) for choice in choices if choice is not None)
                raise ConfigError(f"engine.{name}={getattr(self, name)!r}: choose one of {known}")
        for name in ("enable_prefix_caching", "async_scheduling"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"engine.{name}={getattr(self, name)!r}: give true or false")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"engine.max_num_batched_tokens={self.max_num_batched_tokens}: it must be at least "
                f"engine.max_num_seqs ({self.max_num_seqs}), or running requests would wait for one another"
            )

    def _check_integer(self, name: str, value: object, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"engine.{name}={value!r}: give a whole number from {low} to {high}")
        return value

    @property
    def page_dtype(self) -> str:
        return self.kv_dtype or self.dtype

    @property
    def weight_format(self) -> str:
        return self.weight_dtype or self.dtype

    def model_len(self, longest: int) -> int:
        """`max_model_len` for a model made for `longest` tokens. Raises ConfigError when it is longer."""
        if self.max_model_len is None:
            return longest
        if self.max_model_len > longest:
            raise ConfigError(
                f"engine.max_model_len={self.max_model_len}: the model was made for at most {longest} tokens"
            )
        return self.max_model_len

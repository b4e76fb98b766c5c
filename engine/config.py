"""The engine's options, validated when made; each one changes what the engine does."""

from __future__ import annotations

from dataclasses import dataclass

from engine.chips import CHIPS
from engine.errors import ConfigError
from engine.mesh import AXES

DTYPES = ("float32", "bfloat16")
KV_DTYPES = (*DTYPES, "int8", "float8_e4m3fn")
WEIGHT_DTYPES = (*DTYPES, "int8", "int4")
FLAGS = (
    "enable_prefix_caching",
    "async_scheduling",
    "compiled_steps_trusted",
    "use_aot_forward",
    "compile_runner",
    "runner_verbose",
)
MAX_DRAFT_LOGITS = 64
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
    prefix_cache_capacity: int | float | None = None
    """What cached prefixes may hold of the pages that no request holds: a number of pages (a whole number),
    or a share of all pages (0.3); None: all that are left."""
    scheduling_policy: str = "fcfs"
    """"fcfs", or "priority": lower `priority` first, then age; such a request also takes the place of a
    running one of higher `priority` when seats or pages run out."""
    priority_aging_steps: int | None = 1000
    """Under the priority policy a waiting request is overtaken only by those more urgent by p that come less
    than p times this many steps after it; None: by all of them, without end."""
    long_prefill_token_threshold: int | None = None
    """Most tokens of one request in one step."""
    stream_interval_ms: int = 20
    """Streams of an `AsyncEngine` show what they have drawn at most this often; 0: after every step."""
    async_scheduling: bool = True
    """Plan and start each step while the one before it still runs; False: one after the other."""
    speculation: str = "off"
    """Guess tokens to come and look at several in one step (engine/speculation): "ngram" from a request's own
    text, "suffix" from finished outputs of its template, both in every step; "auto" from both, where it pays.
    On a CPU no output changes by a bit. On a GPU or TPU a logit's last bits may depend on how many tokens are
    computed together, as with the batch sizes, so a token where two are that close may differ there."""
    max_draft_len: int = 8
    """Most tokens guessed for one row of a step."""
    dtype: str = "float32"
    """Of weights and activations."""
    kv_dtype: str | None = None
    """Of the KV pages; None: `dtype`. "int8" has a scale for each token and head; "float8_e4m3fn" is for TPUs
    from v6e on and GPUs from H100 on."""
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
    chip: str | None = None
    """The kind of chip that must be there, such as "v4" or "h100" (`engine.chips.CHIPS`); None: any."""
    compilation_cache_dir: str | None = None
    """JAX's own cache of compiled code, on a local disk; None: `~/.cache/tidemill/compiled`."""
    compiled_steps_path: str | None = None
    """A folder or fsspec URL that whole compiled steps are kept under, for starts that compile and trace
    nothing, on other machines too; None: they are not kept. A local folder that others can write to is
    refused: a compiled step is code."""
    compiled_steps_trusted: bool = False
    """The user's word that only people who may run code here can write to the store that
    `compiled_steps_path` is in."""
    min_token_pad: int = 16
    """The smallest step that is compiled, a power of two from 8: fewer tokens are padded up to it."""
    min_input_pad: int | None = None
    """The same for the rows of a step's logits, the sequences that draw a token; None: `min_token_pad`."""
    use_aot_forward: bool = True
    """Steps are compiled ahead of time, and one of a shape that was not declared is an error; False: they go
    through `jax.jit`, which traces and compiles whatever shape comes."""
    compile_runner: bool = True
    """Every step is compiled when the engine is made; False: each when it first runs."""
    runner_verbose: bool = False
    """Write a line for every step that is compiled or run to the log `engine.runner`."""
    sharding_axis_dims: tuple[int, ...] = (1, 1, 1, -1, 1)
    """Chips along each axis of the mesh, (dp, fsdp, ep, tp, sp); -1, once at most, is all the rest
    (`engine.mesh`). Sequences, tokens and bytes above are those of one dp (or fsdp) replica, of one chip."""

    coordinator_address: str | None = None
    """host:port of the first of several processes that run this engine together (`engine.lockstep`), or
    "auto" where the cluster tells them (TPU, Slurm); None: this process alone."""
    num_processes: int | None = None
    process_id: int | None = None
    """Of all processes, and this one's, from 0: to be given with an address, not with "auto"."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            self._check_integer(name, getattr(self, name), 1, 1 << 20)
        for name in (
            "max_model_len",
            "kv_cache_bytes",
            "long_prefill_token_threshold",
            "priority_aging_steps",
        ):
            if getattr(self, name) is not None:
                self._check_integer(name, getattr(self, name), 2 if name == "max_model_len" else 1, 1 << 50)
        self._check_integer("stream_interval_ms", self.stream_interval_ms, 0, 60_000)
        self._check_integer("seed", self.seed, 0, 2**63 - 1)
        self._check_integer("max_draft_len", self.max_draft_len, 1, 32)
        pads = [("min_token_pad", 8, 1024), ("min_input_pad", 8, 1024)]
        for name, low, high in (("page_size", 8, 512), *pads[: 1 if self.min_input_pad is None else 2]):
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
            ("speculation", ("off", "ngram", "suffix", "auto")),
            ("weight_dtype", (None, *WEIGHT_DTYPES)),
            ("attention_backend", ("auto", "cpu", "xla", "pallas_tpu", "pallas_gpu")),
            ("linear_backend", ("auto", "cpu", "xla")),
            ("platform", ("auto", "cpu", "gpu", "tpu")),
            ("chip", (None, *CHIPS)),
        ):
            if getattr(self, name) not in choices:
                known = ", ".join(str(choice) for choice in choices if choice is not None)
                raise ConfigError(f"engine.{name}={getattr(self, name)!r}: choose one of {known}")
        if self.chip is not None and self.platform not in ("auto", CHIPS[self.chip].platform):
            raise ConfigError(
                f"engine.chip={self.chip} is a {CHIPS[self.chip].platform.upper()} and engine.platform is "
                f"{self.platform}: make them agree, or leave the chip out"
            )
        self._check_axis_dims()
        self._check_processes()
        self._check_cache_capacity()
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"engine.{name}={getattr(self, name)!r}: give true or false")
        if self.compiled_steps_path is not None and not self.use_aot_forward:
            raise ConfigError(
                "engine.compiled_steps_path keeps steps that are compiled ahead of time, and "
                "engine.use_aot_forward is false: leave one of them out"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"engine.max_num_batched_tokens={self.max_num_batched_tokens}: it must be at least "
                f"engine.max_num_seqs ({self.max_num_seqs}), or running requests would wait for one another"
            )

    def _check_cache_capacity(self) -> None:
        capacity = self.prefix_cache_capacity
        if capacity is None or (type(capacity) is int and capacity >= 0):
            return
        if not isinstance(capacity, float) or not 0.0 <= capacity <= 1.0:
            raise ConfigError(
                f"engine.prefix_cache_capacity={capacity!r}: give a whole number of pages, or a share of all "
                "pages from 0.0 to 1.0"
            )

    def _check_axis_dims(self) -> None:
        dims = self.sharding_axis_dims
        is_list = isinstance(dims, (tuple, list)) and len(dims) == len(AXES)
        if not is_list or any(type(size) is not int or (size < 1 and size != -1) for size in dims):
            raise ConfigError(
                f"engine.sharding_axis_dims={dims!r}: give {len(AXES)} whole numbers ({', '.join(AXES)}), "
                "each 1 or more, or -1 for the rest of the devices"
            )
        if list(dims).count(-1) > 1:
            raise ConfigError(f"engine.sharding_axis_dims={list(dims)}: only one of them can be -1, the rest")
        object.__setattr__(self, "sharding_axis_dims", tuple(dims))

    def _check_processes(self) -> None:
        address, count, index = self.coordinator_address, self.num_processes, self.process_id
        has_numbers = count is not None and index is not None
        if address in (None, "auto"):
            if count is not None or index is not None:
                raise ConfigError(
                    "engine.num_processes and engine.process_id go with an engine.coordinator_address of "
                    f"host:port, and it is {address}"
                )
            return
        if not isinstance(address, str) or not address.rpartition(":")[2].isdigit() or not has_numbers:
            raise ConfigError(
                f"engine.coordinator_address={address!r}: give host:port, with engine.num_processes and "
                "engine.process_id, or auto"
            )
        self._check_integer(
            "process_id", index, 0, self._check_integer("num_processes", count, 1, 1 << 16) - 1
        )

    def _check_integer(self, name: str, value: object, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"engine.{name}={value!r}: give a whole number from {low} to {high}")
        return value

    def max_cached_pages(self, num_pages: int) -> int | None:
        """`prefix_cache_capacity` in pages, of `num_pages`; None: no bound."""
        capacity = self.prefix_cache_capacity
        return int(capacity * num_pages) if isinstance(capacity, float) else capacity

    @property
    def num_draft_logits(self) -> int:
        """Rows of logits that a step may have beyond `max_num_seqs`, for drafts; with many rows few pay."""
        if self.speculation == "off":
            return 0
        most = self.max_num_batched_tokens - self.max_num_seqs
        return min(MAX_DRAFT_LOGITS, self.max_num_seqs * self.max_draft_len, most)

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

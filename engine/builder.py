"""An engine built step by step, or from a YAML file, in the manner of `EasyDeLElargeModel`.

    engine = (
        EngineBuilder("HuggingFaceTB/SmolLM2-135M-Instruct")
        .set_dtype("bfloat16")
        .set_sharding(axis_dims=(1, 1, 1, -1, 1))
        .set_esurge(max_model_len=4096, max_num_seqs=32)
        .build_esurge()
    )

The same as YAML, which holds values only:

    model:
      name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
      revision: null
      tokenizer: null
    loader:
      dtype: bfloat16
    sharding:
      axis_dims: [1, 1, 1, -1, 1]
    esurge:
      max_model_len: 4096
      max_num_seqs: 32
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.engine import Engine
from engine.errors import ConfigError
from engine.options import OPTION_NAMES, Options, read_options

_SECTIONS: dict[str, tuple[str, ...]] = {
    "model": ("name_or_path", "revision", "tokenizer"),
    "loader": ("dtype",),
    "sharding": ("axis_dims", "auto_shard_model", "data_parallelism_axis"),
    # A function is no value, and cannot be told in YAML.
    "esurge": tuple(name for name in OPTION_NAMES if name != "sampling_params_callback"),
}
_OPTIONS = {
    ("loader", "dtype"): "dtype",
    ("sharding", "axis_dims"): "sharding_axis_dims",
    ("sharding", "auto_shard_model"): "auto_shard_model",
    ("sharding", "data_parallelism_axis"): "data_parallelism_axis",
}


class EngineBuilder:
    """What an engine is to be; nothing is loaded before `build_esurge`. Each `set_…` returns the builder and
    adds to what was set before. Raises ConfigError for names that there are not, and, in `validate` and
    `build_esurge`, for values that cannot be.
    """

    def __init__(self, config: str | Mapping[str, Any] | None = None):
        """config: a model's name or path, or sections of values."""
        self._values: dict[str, dict[str, Any]] = {}
        self._callback: Any = None
        if isinstance(config, str):
            self.set_model(config)
        elif config is not None:
            self.update(config)

    @classmethod
    def from_yaml(cls, path: str | Path) -> EngineBuilder:
        """Read a local YAML file. It is data: nothing in it is run, and interpolations are refused."""
        try:
            values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        except (OSError, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
        try:
            return cls(_checked_mapping(values, "the file"))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The same as YAML, which `from_yaml` reads; written to `path` if there is one."""
        if self._callback is not None:
            raise ConfigError("a sampling_params_callback is a function and cannot be written as YAML")
        text = OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))
        if path is not None:
            Path(path).write_text(text)
        return text

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The sections, as plain values."""
        return {name: _plain(values) for name, values in self._values.items()}

    # -- what it is to be ----------------------------------------------------------------------------

    def set_model(self, name_or_path: str, **values: Any) -> EngineBuilder:
        """The model, where `engine.checkpoints.load` finds it; `revision` and `tokenizer` as in `Engine`."""
        return self._set("model", {"name_or_path": name_or_path, **values})

    def set_dtype(self, dtype: Any) -> EngineBuilder:
        """Of weights and activations: a name, or what `jax.numpy` calls it."""
        return self._set("loader", {"dtype": dtype})

    def set_sharding(self, **values: Any) -> EngineBuilder:
        """`axis_dims` over (dp, fsdp, ep, tp, sp), `auto_shard_model`, `data_parallelism_axis`."""
        return self._set("sharding", values)

    def set_esurge(self, **options: Any) -> EngineBuilder:
        """The options of `Engine`."""
        if "sampling_params_callback" in options:
            options = dict(options)
            self._callback = options.pop("sampling_params_callback")
        return self._set("esurge", options)

    def update(self, config: Mapping[str, Any]) -> EngineBuilder:
        """Set what several sections hold."""
        for section, values in config.items():
            if section not in _SECTIONS:
                near = difflib.get_close_matches(str(section), _SECTIONS, n=1, cutoff=0.0)
                raise ConfigError(f"there is no section {section!r}: the nearest name is {near[0]!r}")
            self._set(section, _checked_mapping(values, section))
        return self

    def validate(self) -> Options:
        """The engine's options, checked as `Engine` checks them; nothing is loaded."""
        if "name_or_path" not in self._values.get("model", {}):
            raise ConfigError("model.name_or_path is missing: call set_model, or give it in the file")
        for name, value in self._values["model"].items():
            if not isinstance(value, str) and not (value is None and name != "name_or_path"):
                raise ConfigError(f"model.{name}={value!r}: give text")
        return read_options(None, None, None, self._engine_options())

    def build_esurge(self) -> Engine:
        """Load the model and make the engine."""
        self.validate()
        model = self._values["model"]
        return Engine(
            model["name_or_path"],
            tokenizer=model.get("tokenizer"),
            revision=model.get("revision"),
            **self._engine_options(),
        )

    build = build_esurge

    def _engine_options(self) -> dict[str, Any]:
        options = dict(self._values.get("esurge", {}))
        for (section, name), option in _OPTIONS.items():
            value = self._values.get(section, {}).get(name)
            if value is None:
                continue
            if options.get(option, value) != value:
                raise ConfigError(f"{section}.{name} and esurge.{option} are the same and differ: give one")
            options[option] = value
        if self._callback is not None:
            options["sampling_params_callback"] = self._callback
        return options

    def _set(self, section: str, values: Mapping[str, Any]) -> EngineBuilder:
        known = _SECTIONS[section]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
                raise ConfigError(f"{section}.{name} does not exist: the nearest name is {near[0]!r}")
        self._values.setdefault(section, {}).update(copy.deepcopy(dict(values)))
        return self


def _checked_mapping(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} holds a {type(values).__name__}: it must be a mapping of names to values")
    for name, value in values.items():
        for text in _texts(value):
            if "${" in text:
                raise ConfigError(f"{where}: {name} holds {text!r}: values only, nothing is interpolated")
    return values


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for each in value.values() for text in _texts(each)]
    return [text for each in value for text in _texts(each)] if isinstance(value, (list, tuple)) else []


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else _dtype_name(value)
        for name, value in values.items()
    }


def _dtype_name(value: Any) -> Any:
    return np.dtype(value).name if isinstance(value, (type, np.dtype)) else value

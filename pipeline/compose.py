"""Compose the configuration with Hydra, and turn what it has against a command line into one ConfigError.

Hydra composes, prints (`--cfg job`, `--help`) and nothing else: the job runs outside it, so that Hydra makes
no folders, no logs and no tracebacks of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.errors import ConfigError
from pipeline.typed_config import did_you_mean, unknown_key

CONFIG_PACKAGE = "conf"


def compose(arguments: Sequence[str], known: Sequence[str]) -> dict[str, Any] | None:
    """The configuration that command line `arguments` describe, as plain values; None when Hydra has answered
    (`--help`, `--cfg job`, ...) and there is nothing left to do.

    `known` are the dotted keys there are, for naming the nearest one. Raises ConfigError.
    """
    options = _parse(arguments)
    try:
        if any(value for name, value in vars(options).items() if name != "overrides"):
            return _answer(arguments)
        with hydra.initialize_config_module(CONFIG_PACKAGE, version_base="1.3"):
            return _plain(hydra.compose("config", options.overrides))
    except MissingConfigException as error:
        _explain_missing(error, arguments)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        _explain(error, arguments, known)


def _answer(arguments: Sequence[str]) -> dict[str, Any] | None:
    """A command line with Hydra's own flags (`--help`, `--cfg`, `--config-dir`, ...): Hydra's to answer."""
    composed: list[DictConfig] = []

    @hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_PACKAGE}", config_name="config")
    def take(config: DictConfig) -> None:
        composed.append(config)

    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["pipeline.run", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let its exceptions through instead of printing them and exiting
    try:
        take()
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
    return _plain(composed[0]) if composed else None


def groups() -> dict[str, list[str]]:
    """The configuration groups that are shipped and the options of each."""
    root = resources.files(CONFIG_PACKAGE)
    return {
        folder.name: sorted(
            file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")
        )
        for folder in sorted(root.iterdir(), key=lambda entry: entry.name)
        if folder.is_dir() and not folder.name.startswith(("_", "hydra"))
    }


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = get_args_parser()
    parser.error = _bad_option  # type: ignore[method-assign]
    options = parser.parse_args(list(arguments))
    if options.multirun:
        raise ConfigError("--multirun is not supported: start one run for each configuration")
    for override in options.overrides:
        if "=" not in override and not override.startswith("~"):
            raise ConfigError(f"{override!r} is not an override: write key=value, or group=option")
    return options


def _bad_option(message: str) -> NoReturn:
    raise ConfigError(f"{message}: write overrides as key=value; --help lists the rest")


def _plain(config: DictConfig) -> dict[str, Any]:
    """Plain values; a mandatory one that was not given stays `???`."""
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _explain_missing(error: MissingConfigException, arguments: Sequence[str]) -> NoReturn:
    """A group option that is not there."""
    for group, value in _assignments(arguments):
        options = error.options or groups().get(group)
        if options and (error.missing_cfg_file or "").removesuffix(".yaml") == f"{group}/{value}":
            raise _no_option(group, value, options) from error
    raise ConfigError(_one_line(error)) from error


def _no_option(group: str, value: str, options: Sequence[str]) -> ConfigError:
    hint = f"; to name the model itself write model.source={value}" if group == "model" else ""
    return ConfigError(f"no option {value!r} in group {group!r}: {did_you_mean(value, list(options))}{hint}")


def _explain(error: Exception, arguments: Sequence[str], known: Sequence[str]) -> NoReturn:
    """An override that cannot be parsed, or that names what is not there."""
    if isinstance(error, OverrideParseException) or str(error).startswith("Ambiguous value"):
        override = getattr(error, "override", None) or _first_with_comma(arguments)
        raise ConfigError(
            f"cannot read {override!r}: quote values with special characters, as in 'key=\"a=b,c\"', "
            "and write lists as key=[a,b]"
        ) from error
    all_groups = groups()
    for key, value in _assignments(arguments):
        if key in all_groups and value not in all_groups[key]:
            raise _no_option(key, value, all_groups[key]) from error
        if key in all_groups or key.split(".")[0] == "hydra" or key in known:
            continue
        if any(key.startswith(f"{section}.") and section in _free_form(known) for section in known):
            continue
        raise unknown_key(key, list(dict.fromkeys([*all_groups, *known]))) from error
    raise ConfigError(_one_line(error)) from error


def _first_with_comma(arguments: Sequence[str]) -> str:
    """The override Hydra took for a sweep over several values."""
    return next(argument for argument in arguments if "," in argument)


def _free_form(known: Sequence[str]) -> set[str]:
    """Keys without keys below them; a mapping among them takes any."""
    return {key for key in known if not any(other.startswith(f"{key}.") for other in known)}


def _assignments(arguments: Sequence[str]) -> list[tuple[str, str]]:
    pairs = (argument.partition("=") for argument in arguments if not argument.startswith("-"))
    return [(key.lstrip("+~"), value) for key, _, value in pairs]


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:2] if line.strip())

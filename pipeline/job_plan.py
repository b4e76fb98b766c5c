"""What a job is, before it runs: its frozen plan, and the parts of its fingerprint."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.input_files import errors_named, filesystem
from pipeline.plan import PlannedShard, RunPlan
from pipeline.prompts import PromptBuilder
from pipeline.readers import hf_datasets
from pipeline.rows import SourceRow
from pipeline.schema import CarriedColumn, agree, carried_from_arrow, carried_from_values
from pipeline.settings import Settings, result_part
from pipeline.shards import Shard, check_columns, count_rows, read_rows

_VERSIONED_PACKAGES = ("tidemill", "jax", "jaxlib", "flax", "transformers", "numpy", "pyarrow")
# Rows at the beginning of each JSONL shard that decide the type of a carried column.
TYPE_SAMPLE_ROWS = 1000


def make_plan(settings: Settings, shards: Sequence[Shard]) -> RunPlan:
    """The plan of a new run: counts the rows of every shard and fixes the types of carried columns.

    Raises InputError when a shard is damaged or lacks a column that is asked for.
    """
    named = [*settings.input.carry_columns, *filter(None, [settings.input.id_column])]
    check_columns(shards, named)
    return RunPlan(
        shards=tuple(
            PlannedShard(
                index=shard.index,
                name=shard.name,
                url=shard.url,
                num_rows=count_rows(shard),
                version=shard.version,
            )
            for shard in shards
        ),
        chunk_rows=settings.output.chunk_rows,
        carried=_carried_columns(settings, shards),
        output_format=settings.output.format,
        with_token_ids=settings.output.include_token_ids,
        row_group_rows=settings.output.row_group_rows,
        created=_created(settings),
    )


def _created(settings: Settings) -> int | None:
    """The time that a batch's answers bear: as the settings say, or now, for all workers and for good."""
    if settings.output.format != "openai_batch":
        return None
    return int(time.time()) if settings.output.created is None else settings.output.created


def _carried_columns(settings: Settings, shards: Sequence[Shard]) -> tuple[CarriedColumn, ...]:
    names = settings.input.carry_columns
    if not names:
        return ()
    found = []
    for shard in shards:
        schema = _arrow_schema(shard)
        if schema is not None:
            found.append(carried_from_arrow(names, [schema]))
        else:
            rows = read_rows(shard, settings.input, 0, TYPE_SAMPLE_ROWS, names)
            found.append(carried_from_values(names, (r.columns for r in rows if isinstance(r, SourceRow))))
    return agree(found)


def _arrow_schema(shard: Shard) -> pa.Schema | None:
    """The declared types of a shard's columns; None for JSONL, which declares none."""
    if shard.format == "jsonl":
        return None
    if shard.format == "datasets":
        dataset = hf_datasets.open_dataset(shard.url, shard.version["split"], shard.version["revision"])
        return dataset.features.arrow_schema
    fs, path = filesystem(shard.url)
    with errors_named(shard.url), fs.open(path, "rb") as file:
        return pq.read_schema(file)


def fingerprint_parts(
    settings: Settings, loaded: Any, builder: PromptBuilder, shards: Sequence[Shard], platform: str
) -> dict[str, Any]:
    """What the results depend on, by name, so that a resumed run can say which of them has changed."""
    return {
        "config": result_part(settings) | {"platform": platform},
        "sampling": settings.sampling.as_dict(),
        "model": loaded.fingerprint,
        "tokenizer": _tokenizer_fingerprint(loaded.tokenizer),
        "templates": builder.template_sources,
        "input": [{"url": shard.name, "version": shard.version} for shard in shards],
    }


def family_facts(settings: Settings, loaded: Any, platform: str, device: str) -> dict[str, Any]:
    """What a row's tokens depend on besides the row, for the request cache (pipeline/request_cache.py).

    device: as the engine describes it, with its kernels.
    """
    options = {key: value for key, value in result_part(settings).items() if key.startswith("engine.")}
    return {
        "engine": options | {"platform": platform, "device": device},
        "model": loaded.fingerprint,
        "tokenizer": _tokenizer_fingerprint(loaded.tokenizer),
        "versions": package_versions(),
    }


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Installed versions of what the results depend on."""
    found = {}
    for package in _VERSIONED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that was never installed
            continue
    return found

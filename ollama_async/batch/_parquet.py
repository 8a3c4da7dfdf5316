"""The output of a batch as a Parquet file: an export, made of whole lines at the end."""

from __future__ import annotations

import importlib
import itertools
from typing import TYPE_CHECKING, Any

from ._errors import DiskError, OutputRefused
from ._journal import records

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_parquet"]

_ROWS = 1000
_RESPONSE = {
    "text": "string",
    "thinking": "string",
    "embedding": "list",
    "done_reason": "string",
    "prompt_eval_count": "int64",
    "eval_count": "int64",
    "total_duration": "int64",
}


def write_parquet(source: Path, target: Path) -> None:
    """Write the answers in an output as a Parquet file, by rename.

    Raises:
        OutputRefused: The extra is not installed, or the file cannot be made.
        DiskError: It cannot be written.
    """
    try:
        pa: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as exc:
        raise OutputRefused(f'Parquet needs {exc.name}; install it with: pip install "ollama-async[parquet]"') from None
    kinds: dict[str, Any] = {"string": pa.string(), "int64": pa.int64(), "list": pa.list_(pa.float32())}
    fields = [("id", pa.string()), ("index", pa.int64()), ("host", pa.string()), ("model", pa.string())]
    schema = pa.schema([*fields, *((name, kinds[kind]) for name, kind in _RESPONSE.items())])
    new = target.with_name(target.name + ".new")
    try:
        with parquet.ParquetWriter(new, schema) as writer:
            rows = (_row(record) for record, _ in records(source))
            while group := list(itertools.islice(rows, _ROWS)):
                writer.write_table(pa.Table.from_pylist(group, schema))
        new.replace(target)
    except OSError as exc:
        raise DiskError(f"cannot write {target}: {exc}") from exc


def _row(record: dict[str, Any]) -> dict[str, Any]:
    response = record["response"]
    if "custom_id" in record or "embeddings" in response or isinstance(response.get("embedding"), str):
        raise OutputRefused(
            "cannot make a Parquet file of these lines: each needs the default form, with a text or a vector as a list"
        )
    row = {name: record[name] for name in ("id", "index", "host", "model")}
    return row | {name: response.get(name) for name in _RESPONSE}

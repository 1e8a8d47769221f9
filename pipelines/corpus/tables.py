"""Readers of Parquet and Arrow IPC files, the files of `datasets.save_to_disk` among them.

A row group or batch that does not decode costs itself; a file whose footer does not, the file. Strings are taken as the
bytes they are and decoded row by row, since neither format promises valid UTF-8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from configs.schema.corpus import FieldsConfig, SourceConfig
from pipelines.corpus.blocks import Read, document_field, gather
from pipelines.corpus.sources import Rejected, check_reached

TableReader = Callable[[Any, str, int, int | None, SourceConfig], Read]

_ROWS = 1024
"""Rows of a row group that are decoded at a time."""
_BROKEN = (pa.ArrowException, OSError, ValueError, MemoryError)
"""What pyarrow raises for files that are not what they say."""
_IPC_FILE = b"ARROW1"


def row_group_sizes(opened: Any) -> list[int]:
    """Bytes of each row group of a Parquet file; none if it is broken."""
    try:
        metadata = pq.ParquetFile(opened).metadata
        return [metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)]
    except _BROKEN as error:
        check_reached(error, "the file")
        return []


def _lost(name: str, row: int, error: BaseException) -> Rejected:
    check_reached(error, name)
    return Rejected(name, row, f"{str(error).splitlines()[0]}; the rest of the rows is lost", rest=True)


def read_parquet(opened: Any, name: str, begin: int, end: int | None, config: SourceConfig) -> Read:
    """The rows of row groups `begin` to `end` (exclusive)."""
    try:
        file = pq.ParquetFile(opened)
        metadata = file.metadata
        columns = _columns(file.schema_arrow, config.fields)
        row = sum(metadata.row_group(n).num_rows for n in range(begin))
    except _BROKEN as error:
        yield _lost(name, 0, error)
        return
    for group in range(begin, metadata.num_row_groups if end is None else end):
        position = row
        try:
            for batch in file.iter_batches(_ROWS, [group], columns, use_threads=False):
                yield from _rows(batch, name, position, config.fields)
                position += batch.num_rows
        except _BROKEN as error:
            yield _lost(name, position, error)
        row += metadata.row_group(group).num_rows


def read_arrow(opened: Any, name: str, begin: int, end: int | None, config: SourceConfig) -> Read:
    """The rows of an Arrow file or stream, batch by batch."""
    row = 0
    try:
        for batch in _batches(opened):
            batch.validate()
            yield from _rows(batch.select(_columns(batch.schema, config.fields)), name, row, config.fields)
            row += batch.num_rows
    except _BROKEN as error:
        yield _lost(name, row, error)


def _batches(opened: Any) -> Iterator[Any]:
    head = opened.read(len(_IPC_FILE))
    opened.seek(0)
    if head == _IPC_FILE:
        file = pa.ipc.open_file(opened)
        for number in range(file.num_record_batches):
            yield file.get_batch(number)
    else:
        yield from pa.ipc.open_stream(opened)


def _columns(schema: Any, fields: FieldsConfig) -> list[str]:
    mapped = (document_field(fields), fields.id, fields.source, fields.label)
    wanted = list(dict.fromkeys(name for name in mapped if name is not None))  # one column may be several things
    missing = [name for name in wanted if schema.names.count(name) != 1]
    if missing:
        raise ValueError(f"no column {missing[0]!r} (columns: {', '.join(schema.names)[:200]})")
    return wanted


def _rows(batch: Any, name: str, row: int, fields: FieldsConfig) -> Read:
    columns = {column: _values(batch.column(column)) for column in batch.schema.names}
    records = []
    for number in range(batch.num_rows):
        record = {column: values[number] for column, values in columns.items()}
        records.append((row + number, _decoded(record)))
    yield from gather(name, records, fields)


def _values(column: Any) -> list[Any]:
    """The column's values; text as bytes."""
    if pa.types.is_dictionary(column.type):
        column.validate(full=True)
        column = column.dictionary_decode()
    column = column.view(_with_bytes(column.type))
    column.validate(full=True)
    values: list[Any] = column.to_pylist()
    return values


def _with_bytes(kind: Any) -> Any:
    """A type with bytes where it has text, in lists and structs too; the layout of the memory is the same."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_with_bytes(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_with_bytes(field.type)) for field in kind.fields])
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_string_view(kind):
        return pa.binary_view()
    return pa.large_binary() if pa.types.is_large_string(kind) else kind


def _decoded(record: dict[str, Any]) -> dict[str, Any] | ValueError:
    try:
        return {column: _text(value) for column, value in record.items()}
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8: {error.reason}")


def _text(value: Any) -> Any:
    """`value` with all bytes in it decoded."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [_text(one) for one in value]
    return {key: _text(one) for key, one in value.items()} if isinstance(value, dict) else value


TABLE_READERS: dict[str, TableReader] = {"parquet": read_parquet, "arrow": read_arrow}

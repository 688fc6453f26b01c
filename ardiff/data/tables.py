"""Tables in CSV and Parquet files, and Lance tables."""

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from ardiff.data import lance_tables, storage
from ardiff.errors import DataError, DecodeError


def read_columns(uri: str, names: Sequence[str], purpose: str) -> tuple[pa.Table, list[str]]:
    """Those of the columns ``names`` that a table (.csv, .parquet, .lance) has, and the names of all its columns.

    Values of a CSV file are text, also 007; text in quotation marks may have line breaks.

    Args:
        uri: The file.
        names: The columns.
        purpose: What the file should be, for the error, such as ``a list of videos``.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        if lance_tables.is_lance(uri):
            table, columns = lance_tables.read_columns(uri, names)
        elif uri.lower().endswith(".csv"):
            types = pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
            parsing = pacsv.ParseOptions(newlines_in_values=True)
            table = pacsv.read_csv(io.BytesIO(storage.read_bytes(uri)), convert_options=types, parse_options=parsing)
            columns = table.column_names
        else:
            file = pq.ParquetFile(io.BytesIO(storage.read_bytes(uri)))
            columns = file.schema_arrow.names
            table = file.read([name for name in names if name in columns])
        table = table.select([name for name in names if name in columns])
        table.validate(full=True)  # Arrow checks only here that text in Parquet is UTF-8
    except (pa.ArrowException, OSError, DecodeError) as error:
        raise DataError(f"{uri} cannot be read as {purpose} ({error}).") from error
    return table, columns


def to_parquet(table: pa.Table) -> bytes:
    """The content of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()

"""The texts of Parquet files."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def rows_of_groups(file: Path, column: str) -> list[int]:
    """Returns the number of rows of each row group.

    Raises:
      ValueError: if the file is damaged, or lacks the column.
      ImportError: if ``pyarrow`` is not installed.
    """
    with _opened(file) as parquet:
        names, groups = parquet.schema_arrow.names, range(parquet.num_row_groups)
        rows = [parquet.metadata.row_group(group).num_rows for group in groups]
    if column not in names:
        raise ValueError(
            f"{file} has no column {column!r}: it has {', '.join(names)}; set text_field"
        )
    return rows


def read_row_group(file: Path, group: int, column: str) -> list[Any]:
    """Returns the values of a column in a row group.

    Raises:
      ValueError: if the file is damaged.
    """
    with _opened(file) as parquet:
        return parquet.read_row_group(group, columns=[column]).column(column).to_pylist()


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise ImportError(f"reading {file} needs pyarrow: pip install pyarrow") from e
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            yield parquet
    except (pyarrow.ArrowException, ValueError, KeyError, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:  # of the disk, not of the contents
            raise
        raise ValueError(
            f"{file} is damaged, or no Parquet file: {' '.join(str(e).split())}"
        ) from e

"""Rows as files of every format and compression, and rows that stand in a file."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pyarrow
from pyarrow import ipc, parquet

from spo_lightning.data.rows import Rows


def placed(rows, name="a") -> Rows:
    """The rows as if they had been read from a file."""
    return Rows((name, number, row) for number, row in enumerate(rows, 1))


def as_jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(rows) -> bytes:
    return json.dumps(rows, indent=1).encode()


def as_csv(rows, delimiter=",") -> bytes:
    text = io.StringIO(newline="")
    sheet = csv.DictWriter(text, rows[0], delimiter=delimiter)
    sheet.writeheader()
    sheet.writerows(rows)
    return text.getvalue().encode()


def as_tsv(rows) -> bytes:
    return as_csv(rows, "\t")


def as_parquet(rows, group=7) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=group)
    return file.getvalue()


def as_arrow(rows, write=ipc.new_file) -> bytes:
    table, file = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with write(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return file.getvalue()


def as_stream(rows) -> bytes:
    return as_arrow(rows, ipc.new_stream)


def as_zst(raw: bytes) -> bytes:
    return pyarrow.compress(raw, "zstd", asbytes=True)


TEXTS = {".jsonl": as_jsonl, ".json": as_json, ".csv": as_csv, ".tsv": as_tsv}
TABLES = {".parquet": as_parquet, ".arrow": as_arrow}
PACKED = {".gz": gzip.compress, ".zst": as_zst, ".xz": lzma.compress, ".bz2": bz2.compress}

"""The images of a part: whose bytes come from files or from rows, one after the other, decoded as the server does."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app.bulk.addresses import SourceError, beside, open_file, read_bytes
from app.bulk.listing import Item, find_column, is_struct
from app.errors import status_and_code
from app.upload import require_bytes
from model.contract import InputSpec, InterflowError
from model.images import read_input

ROWS_AT_ONCE = 32
"""Of a Parquet file, whose images are held as they are stored."""
CHUNK, CHUNK_BYTES = 64, 2**24
"""Images that a thread fetches and decodes in one go."""
READ_BYTES = 2**20
"""Of files, held before they are decoded."""
BUFFER_BYTES = 2**20

Given = TypeVar("Given")
Made = TypeVar("Made")


class Listed(NamedTuple):
    """One image that there is."""

    image: str
    """Address of the file; of a row, that of its Parquet file, # and the row's number."""
    path: str | None
    """That beside the bytes, or in their place, in a row."""
    source: str | bytes | SourceError
    """Address of its bytes, these themselves, or why there are none."""


class Unreadable(NamedTuple):
    """Why an image has no answer."""

    code: str
    """As that of the server's problem details."""
    detail: str
    """One sentence or two."""

    @classmethod
    def of(cls, error: InterflowError) -> "Unreadable":
        """What the server would answer."""
        code = error.code if isinstance(error, SourceError) else status_and_code(error)[1]
        return cls(code, " ".join(str(error).split()))


Decoded = tuple[Listed, np.ndarray | Unreadable]


def images_of(items: Iterable[Item], column: str | None) -> Iterator[Listed]:
    """The images of a part, in order; `column`: as it was named."""
    for item in items:
        if item.first is None or item.rows is None:
            yield Listed(item.address, None, item.address)
        else:
            yield from _rows(item.address, item.first, item.rows, column)


def chunks(images: Iterable[Listed]) -> Iterator[list[Listed]]:
    """Up to `CHUNK` images each, or fewer where their bytes are at hand already, and many."""
    chunk: list[Listed] = []
    held = 0
    for listed in images:
        chunk.append(listed)
        held += len(listed.source) if isinstance(listed.source, bytes) else 0
        if len(chunk) == CHUNK or held >= CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def decode(chunk: list[Listed], spec: InputSpec, max_bytes: int, max_pixels: int) -> list[Decoded]:
    """Each image without its bytes, and its pixels, uint8 (height, width, channels), or why it has none.

    Small images are first all read and then all decoded, which is a little faster than in turn.
    """
    done: list[Decoded] = []
    waiting: list[tuple[Listed, bytes | InterflowError]] = []
    held = 0
    for listed in chunk:
        source = _bytes_of(listed, max_bytes)
        waiting.append((listed._replace(source=b""), source))
        held += len(source) if isinstance(source, bytes) else 0
        if held >= READ_BYTES:
            done += [_decoded(*one, spec, max_pixels) for one in waiting]
            waiting, held = [], 0
    return done + [_decoded(*one, spec, max_pixels) for one in waiting]


def _bytes_of(listed: Listed, max_bytes: int) -> bytes | InterflowError:
    source = listed.source
    try:
        if isinstance(source, str):
            return read_bytes(source, max_bytes)
        if isinstance(source, bytes):
            require_bytes(source, max_bytes)
    except InterflowError as error:
        return error
    return source


def _decoded(listed: Listed, source: bytes | InterflowError, spec: InputSpec, max_pixels: int) -> Decoded:
    try:
        if isinstance(source, InterflowError):
            raise source
        return listed, read_input(source, spec, max_pixels)
    except InterflowError as error:
        return listed, Unreadable.of(error)


def ahead(
    function: Callable[[Given], Made], values: Iterable[Given], pool: ThreadPoolExecutor, most: int
) -> Iterator[Made]:
    """As `map`, but up to `most` values are worked on by a pool before they are asked for."""
    values = iter(values)
    running = deque(pool.submit(function, value) for value in islice(values, most))
    try:
        while running:
            made = running.popleft().result()
            running.extend(pool.submit(function, value) for value in islice(values, 1))
            yield made
    finally:
        for future in running:
            future.cancel()


def _rows(address: str, first: int, rows: int, named: str | None) -> Iterator[Listed]:
    """Every row of a run comes, whatever of the file can be read."""
    row = first
    try:
        with open_file(address) as file, pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False) as parquet:
            for path, source in _cells(parquet, address, first, rows, named):
                yield Listed(f"{address}#{row}", path, source)
                row += 1
    except FileNotFoundError as error:
        wrong = SourceError.of(error)
    except (pa.ArrowException, OSError, InterflowError) as error:
        wrong = SourceError("invalid_parquet", f"the Parquet file cannot be read ({_line(error)}).")
    else:
        wrong = SourceError("invalid_parquet", "the Parquet file has fewer rows than when it was listed.")
    for missing in range(row, first + rows):
        yield Listed(f"{address}#{missing}", None, wrong)


def _cells(
    parquet: pq.ParquetFile, address: str, first: int, rows: int, named: str | None
) -> Iterator[tuple[str | None, str | bytes | SourceError]]:
    """Path and source of each row of a run."""
    column = find_column(address, parquet.schema_arrow, named)
    groups: list[int] = []
    start = skipped = 0
    for group in range(parquet.metadata.num_row_groups):
        end = start + parquet.metadata.row_group(group).num_rows
        if start < first + rows and end > first:
            skipped = skipped if groups else first - start
            groups.append(group)
        start = end
    if not groups:
        return
    left = rows
    for batch in parquet.iter_batches(ROWS_AT_ONCE, groups, [column], use_threads=False):
        cells = batch.column(0).slice(skipped, left)
        skipped = max(0, skipped - len(batch))
        left -= len(cells)
        yield from _sources(cells, address)
        if not left:
            return


def _sources(cells: pa.Array, address: str) -> Iterator[tuple[str | None, str | bytes | SourceError]]:
    if is_struct(cells.type):
        names = [cells.type.field(place).name for place in range(cells.type.num_fields)]
        fields = dict(zip(names, cells.flatten(), strict=True))
        contents = fields["bytes"].to_pylist()
        paths = fields["path"].to_pylist() if "path" in fields else [None] * len(cells)
    elif pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type) or pa.types.is_string_view(cells.type):
        contents, paths = [None] * len(cells), cells.to_pylist()
    else:
        contents, paths = cells.to_pylist(), [None] * len(cells)
    for content, path in zip(contents, paths, strict=True):
        if content is not None:
            yield path, content
        elif path:
            try:
                yield path, beside(path, address)
            except InterflowError as error:
                yield path, SourceError("missing_file", str(error))
        else:
            yield path, SourceError("no_image", "the row holds neither bytes nor a path.")


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(". ")

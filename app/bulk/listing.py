"""The listing: every image there is, in order and in parts, found with bounded memory however many there are."""

import heapq
import io
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from app.bulk.addresses import Output, files_of, is_pattern, open_file, readable
from app.bulk.plan import Listed, Plan
from model.contract import InterflowError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PARQUET_SUFFIXES = (".parquet", ".pq")
PARTS_A_FILE = 64
"""Row groups of a listing file: its footer is read for each of its parts."""

SORTED_AT_ONCE, MERGED_AT_ONCE, BLOCK = 20_000, 64, 256

SCHEMA = pa.schema([("address", pa.string()), ("first", pa.int64()), ("rows", pa.int64())])


class ListingError(InterflowError):
    """No images, or Parquet files that do not hold them."""


class Item(NamedTuple):
    """An image file, or a run of rows of a Parquet file."""

    address: str
    first: int | None = None
    """Row; None: the file is an image."""
    rows: int | None = None

    @property
    def images(self) -> int:
        """How many it stands for."""
        return 1 if self.rows is None else self.rows


def write_listing(output: Output, plan: Plan, on_images: Callable[[int], object]) -> Listed:
    """List the images of a plan.

    Args:
        output: where the listing goes.
        plan: inputs and options.
        on_images: is told how many more there are, now and then.

    Raises:
        ListingError: there are none, or a Parquet file cannot be read, or holds no column of images.
        AddressError: something cannot be opened, listed or written.
    """
    found = _Found()
    parquet = _is_parquet(plan.inputs)
    if plan.column is not None and not parquet:
        raise ListingError(f"--column is {plan.column!r}, but {_named(plan)} holds images, and no Parquet files.")
    with tempfile.TemporaryDirectory(prefix="interflow-") as folder:
        addresses = _distinct(sorted_outside(found.wanted(plan.inputs, parquet), Path(folder)))
        items = _runs(addresses, plan.column) if parquet else map(Item, addresses)
        images = parts = 0
        of_all = _parts(items, plan.options.part_images)
        while of_file := list(itertools.islice(of_all, 1)):
            first = parts
            buffer = io.BytesIO()
            with pq.ParquetWriter(buffer, SCHEMA, compression="zstd") as writer:
                for part in itertools.chain(of_file, itertools.islice(of_all, PARTS_A_FILE - 1)):
                    writer.write_table(pa.table(list(zip(*part, strict=True)), schema=SCHEMA), len(part))
                    parts += 1
                    of_part = sum(item.images for item in part)
                    images += of_part
                    on_images(of_part)
            output.write(listing_name(first), buffer.getvalue())
    if not images:
        raise ListingError(
            f"no image is in {_named(plan)}. Expected files ending in {', '.join(IMAGE_SUFFIXES)}, Parquet files, or a "
            "pattern that matches files, such as 'photos/**'."
        )
    return Listed(images=images, parts=parts, left_out=found.left_out, parquet=parquet)


def read_part(output: Output, part: int) -> list[Item]:
    """The items of a part.

    Raises:
        ListingError: the listing is not there.
    """
    file = output.open(listing_name(part))
    if file is None:
        raise ListingError(f"{output.address}/{listing_name(part)} is gone. Begin anew in another folder.")
    with file, pq.ParquetFile(file) as listing:
        table = listing.read_row_group(part % PARTS_A_FILE, use_threads=False)
    return [Item(*row.values()) for row in table.to_pylist()]


def listing_name(part: int) -> str:
    """File of OUT whose row group `part % PARTS_A_FILE` lists a part."""
    return f"listing/listing-{part // PARTS_A_FILE:06d}.parquet"


def _named(plan: Plan) -> str:
    return ", ".join(plan.inputs[:3]) + (" ..." if len(plan.inputs) > 3 else "")


# Finding


class _Found:
    """Counts what is left out on the way."""

    left_out = 0

    def wanted(self, inputs: Sequence[str], parquet: bool) -> Iterator[str]:
        """Of folders, the files that are named as images, or as Parquet files; of patterns and files, all."""
        suffixes = PARQUET_SUFFIXES if parquet else IMAGE_SUFFIXES
        for given in inputs:
            for address in files_of(given):
                chosen = not parquet and (address == given or is_pattern(given))
                if chosen or address.lower().endswith(suffixes):
                    yield readable(address)  # what is not UTF-8 is not found again so, and is reported as missing
                else:
                    self.left_out += 1


def _is_parquet(inputs: Sequence[str]) -> bool:
    """There are Parquet files and no images; looks no further than to the first image."""
    seen = False
    for address in (address for given in inputs for address in files_of(given)):
        if address.lower().endswith(IMAGE_SUFFIXES):
            return False
        seen = seen or address.lower().endswith(PARQUET_SUFFIXES)
    return seen


def sorted_outside(addresses: Iterable[str], folder: Path) -> Iterator[str]:
    """All addresses in order, by sorted runs in files of a folder: memory does not grow with their number."""
    levels: list[list[Path]] = []
    numbers = itertools.count()

    def keep(run: Iterable[str], level: int) -> None:
        path = folder / str(next(numbers))
        with path.open("w", encoding="ascii") as file:
            for block in _batched(run, BLOCK):
                file.write(json.dumps(block) + "\n")
        if level == len(levels):
            levels.append([])
        levels[level].append(path)
        if len(levels[level]) == MERGED_AT_ONCE:
            full, levels[level] = levels[level], []
            keep(heapq.merge(*map(_read, full)), level + 1)
            for merged in full:
                merged.unlink()

    for some in _batched(addresses, SORTED_AT_ONCE):
        keep(sorted(some), 0)
    return heapq.merge(*(_read(path) for level in levels for path in level))


def _read(path: Path) -> Iterator[str]:
    with path.open(encoding="ascii") as file:
        for line in file:
            yield from json.loads(line)


def _distinct(addresses: Iterable[str]) -> Iterator[str]:
    return (address for address, _ in itertools.groupby(addresses))


def _batched(values: Iterable, size: int) -> Iterator[list]:
    """Lists of so many, the last of what is left."""
    values = iter(values)
    while some := list(itertools.islice(values, size)):
        yield some


def _parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Up to so many images each. A row group goes whole into one part where it fits into any, else in slices."""
    part: list[Item] = []
    room = size
    for item in items:
        while item.images > room:
            if part and item.images <= size:
                yield part
                part, room = [], size
                continue
            assert item.first is not None  # noqa: S101 - an image file is one image, for which there is room
            assert item.rows is not None  # noqa: S101
            part.append(Item(item.address, item.first, room))
            yield part
            item = Item(item.address, item.first + room, item.rows - room)  # noqa: PLW2901
            part, room = [], size
        before = part[-1] if part else None
        if before is not None and before.rows is not None and item.rows is not None and before.address == item.address:
            part[-1] = Item(item.address, before.first, before.rows + item.rows)  # the row groups follow each other
        else:
            part.append(item)
        room -= item.images
        if not room:
            yield part
            part, room = [], size
    if part:
        yield part


# Parquet


def find_column(address: str, schema: pa.Schema, named: str | None) -> str:
    """Which column of a Parquet file holds images: structs of `bytes` and `path` (Hugging Face), or bytes, or paths.

    Raises:
        ListingError: that named is none, or none was named and there is none, or several of which none is `image`.
    """
    kinds = [[field.name for field in schema if holds(field.type)] for holds in (is_struct, _is_bytes, _is_text)]
    if named is None:
        names = next((names for names in kinds if names), [])
        found = "image" if "image" in names else names[0] if len(names) == 1 else None
    else:
        found = named if any(named in names for names in kinds) else None
    if found is None:
        which = "which column" if named is None else f"not column {named!r}, which"
        raise ListingError(
            f"{address}: {which} holds the images? Expected one of bytes, of paths, or of structs of `bytes` and "
            f"`path`; name it with --column. There are: {', '.join(f'{one.name} ({one.type})' for one in schema)}."
        )
    return found


def is_struct(kind: pa.DataType) -> bool:
    """Of bytes, and a path perhaps."""
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _footer(address: str) -> pq.FileMetaData:
    try:
        with open_file(address) as file:
            return pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise ListingError(
            f"{address}: not a Parquet file that can be read ({str(error).partition(chr(10))[0].rstrip('. ')}). "
            "Mend it, or take it out of the input."
        ) from error


def _runs(addresses: Iterable[str], named: str | None) -> Iterator[Item]:
    """The row groups of Parquet files."""
    for address in addresses:
        footer = _footer(address)
        find_column(address, footer.schema.to_arrow_schema(), named)
        first = 0
        for group in range(footer.num_row_groups):
            rows = footer.row_group(group).num_rows
            if rows:
                yield Item(address, first, rows)
            first += rows

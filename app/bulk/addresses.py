"""Where images come from and tables go: local paths, and addresses such as s3://bucket/folder.

fsspec opens an address where it has the package for it, else pyarrow, which brings S3, Google's and Azure's stores.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import fsspec
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.utils import glob_translate

from app.upload import require_bytes
from model.contract import InterflowError

MAGIC = "*?["


class AddressError(InterflowError):
    """An address that cannot be opened, listed or written."""


class SourceError(InterflowError):
    """A listed image whose bytes cannot be had.

    Args:
        code: stable, as those of `app.errors.PROBLEMS`.
        message: the sentence.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    @classmethod
    def of(cls, error: OSError) -> "SourceError":
        """What the system said, in our words."""
        if isinstance(error, FileNotFoundError):
            return cls("missing_file", "no such file: it was moved or deleted, or its name is not UTF-8.")
        if isinstance(error, IsADirectoryError):
            return cls("no_file", "not a file, but a folder.")
        return cls("unreadable_file", f"the file cannot be read ({error.strerror or error}).")


def absolute(given: str) -> str:
    """The same address whatever the working folder: a local path as an absolute one, without file://.

    Raises:
        AddressError: it cannot be meant, or is not UTF-8.
    """
    given = given.removeprefix("file://")
    if "::" in given:
        raise AddressError(f"{given}: addresses within addresses (::) are not read. Unpack it first.")
    address = given.rstrip("/") if is_remote(given) else os.path.abspath(given)  # noqa: PTH100 - resolve() would follow links
    require_utf8(address)
    return address


def require_utf8(name: str) -> None:
    """Refuse what run.json and the tables cannot hold.

    Raises:
        AddressError: the name is not UTF-8.
    """
    if (shown := readable(name)) != name:
        raise AddressError(f"{shown}: the name is not UTF-8. Rename it, or name a link to it.")


def readable(name: str) -> str:
    """The name itself where it is UTF-8, else with escapes in the place of what is not."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_remote(address: str) -> bool:
    """Not a path of this machine."""
    return "://" in address


def is_pattern(address: str) -> bool:
    """Names files by wildcards; a local file or folder may bear their marks in its own name."""
    if is_remote(address):
        return "*" in address or "[" in address  # a question mark begins the query of an address
    return any(mark in address for mark in MAGIC) and not Path(address).exists()


def beside(path: str, file: str) -> str:
    """What a path means that is written in a file: relative to that file's folder."""
    return absolute(path if is_remote(path) or Path(path).is_absolute() else f"{file.rpartition('/')[0]}/{path}")


@lru_cache(maxsize=16)
def _arrow(root: str) -> tuple[fsspec.AbstractFileSystem, str]:
    found, path = pyarrow.fs.FileSystem.from_uri(root)
    return ArrowFSWrapper(found), path


def filesystem(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Who holds an address, and its path there.

    Raises:
        AddressError: nobody that is installed.
    """
    try:
        return fsspec.url_to_fs(address, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        scheme, _, path = address.partition("://")
        bucket, _, rest = path.partition("/")
        try:
            found, root = _arrow(f"{scheme}://{bucket or '/'}")
        except (pyarrow.ArrowException, OSError, ValueError):
            raise AddressError(f"{address}: cannot be opened ({error}).") from error
        return found, f"{root.rstrip('/')}/{rest}"


def open_file(address: str) -> BinaryIO:
    """A file to read, which can be sought in. Raises OSError."""
    if not is_remote(address):
        return Path(address).open("rb")
    found, path = filesystem(address)
    return found.open(path, "rb")


def read_bytes(address: str, max_bytes: int) -> bytes:
    """An image's bytes; no more is read than one more than may be.

    Raises:
        SourceError: they cannot be had.
        EmptyImageError, TooManyBytesError: none, or too many.
    """
    try:
        if is_remote(address):
            found, key = filesystem(address)
            source = found.cat_file(key, end=max_bytes + 1)
        else:
            with open(address, "rb", buffering=0, opener=_without_waiting) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise SourceError("no_file", "not a file, but a device or a pipe.")
                source = file.read(min(status.st_size, max_bytes) + 1)
    except OSError as error:
        raise SourceError.of(error) from error
    except InterflowError:
        raise
    except Exception as error:  # packages for stores have errors of their own
        raise SourceError("unreadable_file", f"the file cannot be read ({_line(error)}).") from error
    require_bytes(source, max_bytes)
    return source


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # as a pipe without a writer would have it


def files_of(given: str) -> Iterator[str]:
    """Addresses of the files that an absolute address names: one file, all below a folder, or what a pattern matches.

    One by one, in no order; hidden files and folders (.name) are left out. Nothing is held but the folders on the way
    to where it is, and of a remote folder the names in it.

    Raises:
        AddressError: nothing is there, or a folder cannot be listed.
    """
    try:
        if is_pattern(given):
            yield from _matching(given)
        elif is_remote(given):
            found, path = filesystem(given)
            if found.isfile(path):
                yield given
            else:
                yield from _remote(given, None)
        elif Path(given).is_dir():
            yield from _local(given, -1, (os.path.realpath(given),))
        else:
            Path(given).stat()
            yield given
    except OSError as error:
        raise AddressError(
            f"{error.filename or given}: cannot be listed ({error.strerror or error}). Expected a folder, a file, a "
            "pattern such as 'photos/**/*.jpg', or Parquet files."
        ) from error


def _matching(pattern: str) -> Iterator[str]:
    """As `files_of`; a folder that matches is none of the files. ** stands for any folders."""
    base, depth = _reach(pattern)
    matches = re.compile(glob_translate(pattern)).match
    found = _remote(base, depth) if is_remote(base) else _local(base, depth, (os.path.realpath(base),))
    return (address for address in found if matches(address))


def _reach(given: str) -> tuple[str, int]:
    """The folder whose files an absolute address may name, and down to how many folders below (-1: any)."""
    if not is_pattern(given):
        return given, -1
    first = min(given.index(mark) for mark in MAGIC if mark in given)
    base = given[:first].rpartition("/")[0] or "/"
    rest = given[len(base) :].strip("/")
    return base, -1 if "**" in rest else rest.count("/")


def reaches(given: str, folder: str) -> bool:
    """Files of a folder may be looked at where the files of `given` are listed; both are absolute addresses."""
    base, depth = _reach(given)
    outer, inner = f"{base.rstrip('/')}/", f"{folder}/"
    return inner.startswith(outer) and (depth < 0 or inner.count("/") - outer.count("/") <= depth)


def _local(folder: str, depth: int, trail: tuple[str, ...]) -> Iterator[str]:
    """Files down to so many folders below (-1: any); `trail`: real paths on the way, for links may lead back."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not _is_folder(entry):
                yield entry.path
            elif depth and not entry.is_symlink():
                yield from _local(entry.path, depth - 1, trail)
            elif depth:
                real = os.path.realpath(entry.path)
                if not any(f"{passed}/".startswith(f"{real}/") for passed in trail):
                    yield from _local(entry.path, depth - 1, (*trail, real))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # such as a link to itself: who reads it is told why it cannot be


def _remote(folder: str, depth: int | None) -> Iterator[str]:
    found, root = filesystem(folder)
    below = None if depth is None or depth < 0 else depth + 1
    for path, folders, files in found.walk(root, maxdepth=below, detail=True, on_error="raise"):
        for hidden in [name for name in folders if name.startswith(".")]:
            del folders[hidden]
        inner = path.rstrip("/")[len(root.rstrip("/")) :]
        for name in files:
            if name and not name.startswith("."):
                yield f"{folder.rstrip('/')}{inner}/{name}"


class Output:
    """The folder OUT, local or not: files that are whole or not there.

    Args:
        address: absolute.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def open(self, name: str) -> BinaryIO | None:
        """A file to read, or None: there is none."""
        try:
            return open_file(f"{self.address}/{name}")
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Put a whole file there: locally by a temporary one that takes its place, in a store by one put.

        Raises:
            AddressError: cannot be written.
        """
        target = f"{self.address}/{name}"
        try:
            if is_remote(target):
                found, path = filesystem(target)
                found.makedirs(path.rpartition("/")[0], exist_ok=True)
                found.pipe_file(path, content)
            else:
                _replace(Path(target), content)
        except InterflowError:
            raise
        except Exception as error:  # packages for stores have errors of their own
            reason = error.strerror if isinstance(error, OSError) and error.strerror else _line(error)
            raise AddressError(f"{target}: cannot be written ({reason}).") from error

    def names(self) -> list[str]:
        """What is in it, hidden files left out; nothing where it does not exist yet."""
        try:
            if is_remote(self.address):
                found, path = filesystem(self.address)
                listed = [str(name).rstrip("/").rpartition("/")[2] for name in found.ls(path, detail=False)]
            else:
                listed = [entry.name for entry in Path(self.address).iterdir()]
        except FileNotFoundError:
            return []
        return sorted(name for name in listed if not name.startswith("."))

    def sweep(self, names: Iterable[str]) -> None:
        """Remove what killed writers of files with such names (patterns) left; nobody else may write meanwhile."""
        if not is_remote(self.address):
            for name in names:
                for left in Path(self.address).glob(str(_temporary(Path(name), "*"))):
                    left.unlink(missing_ok=True)


def _temporary(path: Path, writer: object) -> Path:
    return path.with_name(f".{path.name}-{writer}.tmp")


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path, os.getpid())
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _line(error: Exception) -> str:
    return (str(error).partition("\n")[0] or type(error).__name__).rstrip(". ")

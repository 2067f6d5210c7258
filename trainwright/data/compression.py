"""Open a file of any file system as plain bytes, decompressing gz and zst while reading.

Damage is reported with the file's name: a truncated or broken stream never ends quietly as if it were complete.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from trainwright.base.errors import DataError, MissingDependencyError

__all__ = ["COMPRESSIONS", "DamagedFileError", "open_binary", "open_seekable"]

COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
_CHUNK = 1 << 18
_IN_MEMORY = 64 << 20  # decompressed Parquet beyond 64 MiB goes to a temporary file


class DamagedFileError(DataError):
    """The bytes of a file cannot be what its name says: truncated, broken or of another format."""


class _ZstdStream(io.RawIOBase):
    """zstandard's own stream reader takes a cut file for a complete one; this one says that it is cut."""

    def __init__(self, raw: IO[bytes], decompressor: Any) -> None:
        self._raw = raw
        self._new_frame = decompressor.decompressobj
        self._frame: Any = None
        self._ready = b""
        self._unread = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._unread or self._raw.read(_CHUNK)
            self._unread = b""
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self._frame is None:
                self._frame = self._new_frame()
            self._ready = self._frame.decompress(chunk)
            if self._frame.eof:
                self._unread = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _decompress(raw: IO[bytes], compression: str | None) -> IO[bytes]:
    if compression is None:
        return raw
    if compression == "gz":
        return cast("IO[bytes]", io.BufferedReader(gzip.GzipFile(fileobj=raw), _CHUNK))
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependencyError(
            "reading .zst files needs the package zstandard", hint="pip install 'trainwright[zstd]'"
        ) from error
    # 2 GiB is zstd's largest window (--ultra --long=31); the default refuses files made with --long
    stream = _ZstdStream(raw, zstandard.ZstdDecompressor(max_window_size=2**31))
    return cast("IO[bytes]", io.BufferedReader(stream, _CHUNK))


@contextlib.contextmanager
def open_binary(url: str, compression: str | None) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file, streamed. Raises DataError when it is missing, DamagedFileError when broken."""
    import fsspec

    try:
        with contextlib.ExitStack() as stack:
            # "rb" without fsspec's own decompression: it would not notice a cut zstd file
            raw = stack.enter_context(fsspec.open(url, "rb"))
            stream = stack.enter_context(_decompress(cast("IO[bytes]", raw), compression))
            yield stream
    except FileNotFoundError as error:
        raise DataError(f"{url}: the file is gone", hint="check the path; it may have moved since listing") from error
    except PermissionError as error:
        raise DataError(f"{url}: may not be read ({error})", hint="check the file's permissions") from error
    except IsADirectoryError as error:
        raise DataError(f"{url}: is a folder where a file was expected") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedFileError(
            f"{url}: truncated or broken {compression} data: {error}", hint="download or compress the file again"
        ) from error
    except Exception as error:
        if type(error).__module__.startswith("zstandard"):
            raise DamagedFileError(
                f"{url}: broken zst data: {error}", hint="download or compress the file again"
            ) from error
        if isinstance(error, OSError):
            raise DataError(
                f"{url}: cannot be read: {error}", hint="check the path, credentials and network"
            ) from error
        raise


@contextlib.contextmanager
def open_seekable(url: str, compression: str | None) -> Iterator[IO[bytes]]:
    """The same for formats that jump about (Parquet, Arrow files): compressed ones are unpacked to temporary space."""
    with open_binary(url, compression) as stream:
        if compression is None:
            yield stream
            return
        with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as space:
            while chunk := stream.read(_CHUNK):
                space.write(chunk)
            space.seek(0)
            yield cast("IO[bytes]", space)

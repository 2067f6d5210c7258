"""From what a person names to files: `list_shards` finds the files of a source, always in the same order."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

from trainwright.base.errors import DataError
from trainwright.data.arrow_formats import ARROW_FORMATS, HF_PREFIX, hub_shard, is_saved_dataset, saved_dataset_files
from trainwright.data.compression import COMPRESSIONS
from trainwright.data.documents import Shard, SourceSpec, nearest
from trainwright.data.formats import TEXT_FORMATS
from trainwright.data.stdlib_corpus import STDLIB_SOURCE, stdlib_shards

__all__ = ["FORMATS", "list_shards"]

FORMATS = {**TEXT_FORMATS, **ARROW_FORMATS}
"""Known file extensions and the format that reads each."""

_GLOB = set("*?[")
_SKIPPED_FOLDERS = {"__pycache__", "node_modules"}
# what `datasets` and LLaMA-Factory keep beside their data: about the data, not data
_SKIPPED_NAMES = {"dataset_dict.json", "dataset_info.json", "state.json"}


def list_shards(spec: SourceSpec) -> list[Shard]:
    """The files of a source, sorted by key. Raises DataError when there are none, or when all are empty.

    A file may have any ending (an unknown one is read as text); a folder is searched recursively for known endings,
    hidden files left out; a glob takes `**`, and takes unknown endings where it names the ending (`*.en`).
    """
    source = spec.source
    if source == STDLIB_SOURCE:
        return stdlib_shards()
    if source.startswith(HF_PREFIX) and not source.startswith("hf://datasets/"):
        return [hub_shard(source)]
    if "://" not in source and is_saved_dataset(Path(source)):
        folder = Path(source)
        return [_shard(str(file), file.relative_to(folder).as_posix(), {}) for file in saved_dataset_files(folder)]
    shards = sorted(_file_shards(source), key=lambda shard: shard.key)
    if all(shard.size == 0 for shard in shards):
        what = "the file is empty" if len(shards) == 1 else f"all {len(shards)} files are empty"
        raise DataError(f"{source}: {what}; expected text to train on", hint="name a source with text in it")
    return shards


def _file_shards(source: str) -> list[Shard]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(source)
        found = fs.info(path) if fs.exists(path) else None
        if found is not None and found["type"] == "directory":
            return _folder_shards(source, fs, path)
        if found is not None:
            return [_shard(source, posixpath.basename(path), found)]
        if _GLOB & set(path):
            return _glob_shards(source, fs, path)
    except DataError:
        raise
    except Exception as error:  # file systems raise what their clients raise
        cause = " ".join(str(error).split())
        raise DataError(
            f"{source}: cannot be listed: {type(error).__name__}: {cause}",
            hint="check the URL, credentials and network; remote systems need their fsspec package (s3fs, gcsfs)",
        ) from error
    raise DataError(f"{source}: no such file or folder{_similar(fs, path)}", hint="check the path of this data source")


def _similar(fs: Any, path: str) -> str:
    """A file of nearly the same name in the same folder, if any."""
    parent = posixpath.dirname(path)
    try:
        names = [posixpath.basename(item.rstrip("/")) for item in fs.ls(parent, detail=False)]
    except Exception:  # only a help for the message: a folder that cannot be listed helps nobody
        return ""
    return nearest(posixpath.basename(path), names)


def _folder_shards(source: str, fs: Any, root: str) -> list[Shard]:
    shards = []
    others = 0
    for path, info in fs.find(root, detail=True).items():
        key = posixpath.relpath(path, root)
        name = posixpath.basename(path)
        if _is_hidden(key):
            continue
        if name in _SKIPPED_NAMES or _format_of(name)[0] is None:
            others += 1
            continue
        shards.append(_shard(_url(source, fs, path), key, info))
    if not shards:
        seen = f"{others} files with other endings" if others else "no files"
        raise DataError(
            f"{source}: the folder holds no file of a known format ({seen})",
            hint=f"known endings (also with .gz, .zst): {' '.join(sorted(FORMATS))}; a glob like '*.en' takes others",
        )
    return shards


def _glob_shards(source: str, fs: Any, pattern: str) -> list[Shard]:
    found = {path: info for path, info in fs.glob(pattern, detail=True).items() if info["type"] == "file"}
    if not found:
        raise DataError(f"{source}: the pattern matches no file", hint="check it; ** stands for any folders")
    last = posixpath.basename(pattern)
    names_ending = "." in last and not _GLOB & set(last.rsplit(".", 1)[1])
    fixed = pattern[: min(pattern.index(mark) for mark in _GLOB if mark in pattern)]
    root = posixpath.dirname(fixed)
    names_hidden = _is_hidden(pattern[len(root) :].lstrip("/"))
    shards = []
    for path, info in found.items():
        key = posixpath.relpath(path, root) if root else path
        name = posixpath.basename(path)
        if _is_hidden(key) and not names_hidden:
            continue
        if name in _SKIPPED_NAMES or (_format_of(name)[0] is None and not names_ending):
            continue
        shards.append(_shard(_url(source, fs, path), key, info))
    if not shards:
        raise DataError(
            f"{source}: the pattern matches {len(found)} files, none of a known format",
            hint=f"name the ending in the pattern, or use one of {' '.join(sorted(FORMATS))}",
        )
    return shards


def _is_hidden(key: str) -> bool:
    """Whether a relative path is no data: hidden, a cache, or installed code."""
    return any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in key.split("/"))


def _url(source: str, fs: Any, path: str) -> str:
    """The address of a found file, in the style of the source: local paths plain, URL chains kept whole."""
    if "://" not in source and "::" not in source:
        if Path(source).is_absolute():
            return path
        relative = posixpath.relpath(path, Path.cwd().as_posix())
        return relative if not relative.startswith("..") else path
    parts = source.split("::")
    for index, part in enumerate(parts):
        if "://" in part:
            protocol = part.split("://", 1)[0]
            bare = path.split("://", 1)[1] if "://" in path else path
            return "::".join([*parts[:index], f"{protocol}://{bare}", *parts[index + 1 :]])
    return str(fs.unstrip_protocol(path))


def _format_of(name: str) -> tuple[str | None, str | None]:
    """(format, compression) by the ending of a file name; the format is None when unknown."""
    lower = name.lower()
    compression = None
    for suffix, kind in COMPRESSIONS.items():
        if lower.endswith(suffix):
            compression = kind
            lower = lower[: -len(suffix)]
    return FORMATS.get(posixpath.splitext(lower)[1]), compression


def _shard(url: str, key: str, info: dict[str, Any]) -> Shard:
    kind, compression = _format_of(posixpath.basename(url.split("::", 1)[0]) if "::" in url else url)
    if not info:
        status = Path(url).stat() if Path(url).exists() else None
        info = {"size": status.st_size, "mtime": status.st_mtime_ns} if status else {}
    changed = next(
        (info[name] for name in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(name)), None
    )
    return Shard(url, kind or "text", compression, info.get("size"), key, None if changed is None else str(changed))

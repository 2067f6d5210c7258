"""Reads a file that torch wrote with its own save function as data: no function that the file names is ever called.

Such a file is a zip archive with the bytes of the tensors and one program for Python's object machine, which can call
anything. Here only the instructions that build containers and numbers are carried out. Where the program asks for a
call, it gets a tensor (a view of the mapped file), a plain container, or an `Inert`: a note of what was asked for.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainwright.base.errors import CheckpointError

__all__ = ["Inert", "read_torch_file"]

MAX_PROGRAM_BYTES = 1 << 30

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


@dataclass(eq=False)
class Inert:
    """An object that the file wanted made: the name of its class or function, and what it was to be called with."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    data: torch.Tensor


class _Mark:
    pass


_MARK = _Mark()


def read_torch_file(path: Path) -> Any:
    """The object in the file: dicts, lists, tuples, numbers, texts and tensors; anything else as `Inert`.

    Tensors are views of the file, which is mapped, not read: using one reads its bytes.

    Raises:
        CheckpointError: it is no such file, is damaged, or needs an instruction that is not carried out.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Machine(path, archive).run()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", hint=error.hint) from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: it is not an archive that torch wrote ({error})",
            hint="it is damaged, or older than torch 1.6: load it there and save it again",
        ) from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RuntimeError, struct.error) as error:
        raise CheckpointError(f"{path}: it is damaged: {type(error).__name__}: {error}") from error


@dataclass
class _Machine:
    """The object machine, reduced to building data."""

    path: Path
    archive: zipfile.ZipFile
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[str, _Storage] = field(default_factory=dict)

    def run(self) -> Any:
        programs = [entry for entry in self.archive.infolist() if entry.filename.count("/") == 1]
        programs = [entry for entry in programs if entry.filename.endswith("/data.pkl")]
        if len(programs) != 1 or programs[0].file_size > MAX_PROGRAM_BYTES:
            raise CheckpointError("it is not an archive that torch wrote: there is no data.pkl of a sane size in it")
        self.root = programs[0].filename.split("/")[0]
        order = f"{self.root}/byteorder"
        if order in self.archive.namelist() and self.archive.read(order) != b"little":
            raise CheckpointError("it was written on a big-endian machine")
        for instruction, argument, _ in pickletools.genops(self.archive.read(programs[0])):
            if instruction.name == "STOP":
                return self.stack.pop()
            self.step(instruction.name, argument)
        raise CheckpointError("its program has no end")

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(Inert(argument.replace(" ", ".")))
        elif name in _ACTIONS:
            _ACTIONS[name](self)
        elif name not in ("PROTO", "FRAME"):
            raise CheckpointError(f"its program uses the instruction {name}, which is not carried out")

    def pop(self, count: int) -> list[Any]:
        values = self.stack[-count:]
        if len(values) != count:
            raise CheckpointError("its program takes more than it has made")
        del self.stack[-count:]
        return values

    def pop_to_mark(self) -> list[Any]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                values = self.stack[start + 1 :]
                del self.stack[start:]
                return values
        raise CheckpointError("its program goes back to a mark that it did not set")

    # --- instructions with more to them ---

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)

    def call(self) -> None:
        function, arguments = self.pop(2)
        self.stack.append(self.built(function, arguments))

    def build(self) -> None:
        state = self.pop(1)[0]
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state

    def name(self) -> None:
        module, name = self.pop(2)
        self.stack.append(Inert(f"{module}.{name}"))

    def built(self, function: Any, arguments: Any) -> Any:
        """What stands for a call: data where we know what it means, else a note."""
        name = function.name if isinstance(function, Inert) else ""
        arguments = arguments if isinstance(arguments, tuple) else ()
        if name == "torch._utils._rebuild_tensor_v2":
            return self.tensor(*arguments[:4])
        if (
            name == "torch._tensor._rebuild_from_type_v2"
        ):  # a tensor with attributes: (function, type, arguments, state)
            return self.built(arguments[0], arguments[2])
        if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return arguments[0]
        if name == "_codecs.encode" and arguments[1:] == ("latin1",) and isinstance(arguments[0], str):
            return arguments[0].encode("latin1")  # how bytes are written in the protocol that torch uses
        if name == "torch.Size":
            return tuple(arguments[0])
        if name in ("collections.OrderedDict", "builtins.dict", "collections.defaultdict"):
            pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
            return dict(pairs)
        return Inert(name, arguments)

    def persistent(self) -> None:
        """A reference to the bytes of a tensor."""
        kind, storage, key, _, elements = self.pop(1)[0]
        if kind != "storage" or not isinstance(storage, Inert):
            raise CheckpointError(f"it refers to something that is not a tensor: {str(kind)[:60]}")
        if key not in self.storages:
            dtype = _STORAGES.get(storage.name.rsplit(".", 1)[-1])
            if dtype is None:
                raise CheckpointError(f"it holds a tensor of the kind {storage.name}, which is not known")
            self.storages[key] = _Storage(dtype, self.mapped(f"{self.root}/data/{key}", dtype, int(elements)))
        self.stack.append(self.storages[key])

    def mapped(self, name: str, dtype: torch.dtype, elements: int) -> torch.Tensor:
        """The elements of a storage, mapped."""
        entry = self.archive.getinfo(name)
        size = elements * dtype.itemsize
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < size or elements < 0:
            raise CheckpointError(f"{name}: {entry.file_size} bytes, {size} are needed (compressed, or cut off)")
        if not elements:
            return torch.empty(0, dtype=dtype)
        with open(self.path, "rb") as file:
            file.seek(entry.header_offset)
            header = file.read(30)
        if header[:4] != b"PK\3\4":
            raise CheckpointError(f"{name}: no entry of the archive begins where its index says")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        # Copy on write: the file stays as it is whatever is done with the tensor.
        region = np.memmap(self.path, dtype=np.uint8, mode="c", offset=start, shape=(size,))
        return torch.from_numpy(region).view(dtype)

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> torch.Tensor:
        numbers = [offset, *size, *stride]
        if not isinstance(storage, _Storage) or len(size) != len(stride):
            raise CheckpointError("it describes a tensor that makes no sense")
        if any(type(number) is not int or number < 0 for number in numbers):
            raise CheckpointError(f"it describes a tensor of shape {size} and stride {stride}, which makes no sense")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) and last >= storage.data.numel():
            raise CheckpointError(f"it describes a tensor of shape {list(size)} that goes beyond its bytes")
        if not math.prod(size):
            return torch.empty(tuple(size), dtype=storage.dtype)
        return storage.data.as_strided(tuple(size), tuple(stride), offset)


_VALUES = frozenset(
    {
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    }
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Inert("builtins.set"),
    "MARK": lambda: _MARK,
}
_ACTIONS: dict[str, Callable[[_Machine], Any]] = {
    "TUPLE": lambda m: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m: m.stack.append(tuple(m.pop(1))),
    "TUPLE2": lambda m: m.stack.append(tuple(m.pop(2))),
    "TUPLE3": lambda m: m.stack.append(tuple(m.pop(3))),
    "LIST": lambda m: m.stack.append(m.pop_to_mark()),
    "SETITEM": lambda m: m.set_items(m.pop(2)),
    "SETITEMS": lambda m: m.set_items(m.pop_to_mark()),
    "APPEND": lambda m: m.append(m.pop(1)),
    "APPENDS": lambda m: m.append(m.pop_to_mark()),
    "ADDITEMS": lambda m: m.pop_to_mark() and None,
    "FROZENSET": lambda m: m.stack.append(Inert("builtins.frozenset", tuple(m.pop_to_mark()))),
    "POP": lambda m: m.pop(1),
    "POP_MARK": lambda m: m.pop_to_mark(),
    "DUP": lambda m: m.stack.append(m.stack[-1]),
    "STACK_GLOBAL": lambda m: m.name(),
    "REDUCE": lambda m: m.call(),
    "NEWOBJ": lambda m: m.call(),
    "BUILD": lambda m: m.build(),
    "BINPERSID": lambda m: m.persistent(),
}

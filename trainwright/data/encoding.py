"""Tokenizing in parallel: batches of segments to worker processes and back as raw arrays, in order.

Workers are plain subprocesses that speak length-prefixed bytes over their pipes: nothing is pickled, a caller's script
is not imported a second time (it needs no `if __name__ == "__main__"`), no thread is forked, and a worker that dies is
noticed at once. A worker ends when its input does, so none outlives the build.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import DataError
from trainwright.data.corpus import Segment

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["Encoded", "EncoderPool", "Framing", "encode"]

FIRST, LAST = 1, 2
_HEAD = struct.Struct("<Q")
_MAIN = "from trainwright.data.encoding import worker_main; worker_main()"


@dataclass(frozen=True)
class Framing:
    """Ids that begin and end each document (None: nothing), the id of unknown text, and the type of tokens on disk."""

    bos: int | None
    eos: int | None
    unknown: int | None
    dtype: str


@dataclass(frozen=True)
class Encoded:
    """The ids of a batch: all `tokens` in one array, `lengths` per segment, and how many are the unknown token."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    unknown: NDArray[np.int64]
    """Unknown tokens per segment."""
    bytes: NDArray[np.int64]
    """UTF-8 bytes of the text per segment."""


def encode(tokenizer: Tokenizer, texts: Sequence[str], flags: Sequence[int], framing: Framing) -> Encoded:
    """Tokenize texts; `flags` say which begin (FIRST) and end (LAST) a document and so get bos and eos."""
    # parse_special=False: a document that spells a special token holds its characters, not its meaning
    ids = tokenizer.encode_batch(list(texts), parse_special=False)
    if framing.bos is not None:
        ids = [[framing.bos, *one] if flag & FIRST else one for one, flag in zip(ids, flags, strict=True)]
    if framing.eos is not None:
        ids = [[*one, framing.eos] if flag & LAST else one for one, flag in zip(ids, flags, strict=True)]
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    # fromiter straight into 16 bits: 25 ns a token against 45 through an intermediate list
    tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype=framing.dtype, count=int(lengths.sum()))
    unknown = np.zeros(len(ids), dtype=np.int64)
    if framing.unknown is not None:
        owner = np.repeat(np.arange(len(ids)), lengths)
        unknown = np.bincount(owner[tokens == framing.unknown], minlength=len(ids)).astype(np.int64)
    sizes = np.fromiter((len(text.encode("utf-8")) for text in texts), dtype=np.int64, count=len(texts))
    return Encoded(tokens, lengths, unknown, sizes)


class EncoderPool:
    """Tokenizes batches of segments: in this process, or in `workers` processes when more than one is asked for.

    Use as a context manager. `submit` gives a Future; results are the same whatever the number of workers.

    Args:
        tokenizer: what encodes in this process.
        folder: where the same tokenizer is saved, for the workers to load.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path, framing: Framing, workers: int) -> None:
        self._tokenizer = tokenizer
        self._framing = framing
        self._executor: ThreadPoolExecutor | None = None
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        if workers > 1:
            for _ in range(workers):
                worker = _Worker(folder, framing, tokenizer.fingerprint)
                self._workers.append(worker)
                self._idle.put(worker)
            self._executor = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")

    def submit(self, batch: Sequence[Segment]) -> Future[Encoded]:
        """Start to tokenize a batch. Raises what tokenizing raises, at the latest when the result is asked for."""
        texts = [segment.text for segment in batch]
        flags = [FIRST * segment.first | LAST * segment.last for segment in batch]
        if self._executor is not None:
            return self._executor.submit(self._in_worker, texts, flags)
        done: Future[Encoded] = Future()
        done.set_result(encode(self._tokenizer, texts, flags, self._framing))
        return done

    def _in_worker(self, texts: list[str], flags: list[int]) -> Encoded:
        worker = self._idle.get()
        try:
            return worker.encode(texts, flags)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            if kind is not None:
                for worker in self._workers:  # unblocks the threads that wait for an answer
                    worker.kill()
            self._executor.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()


class _Worker:
    """One tokenizing subprocess. Used by one thread at a time."""

    def __init__(self, folder: Path, framing: Framing, fingerprint: str) -> None:
        self._framing = framing
        package_root = str(Path(__file__).resolve().parents[2])
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH")]))
        environment["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
        settings = {
            "folder": str(folder), "fingerprint": fingerprint, "bos": framing.bos, "eos": framing.eos,
            "unknown": framing.unknown, "dtype": framing.dtype,
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def encode(self, texts: list[str], flags: list[int]) -> Encoded:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        raw = [text.encode("utf-8") for text in texts]
        sizes = np.fromiter(map(len, raw), dtype=np.int64, count=len(raw))
        try:
            _send(self._process.stdin, sizes.tobytes(), bytes(flags), b"".join(raw))
            answer = _receive(self._process.stdout, 4)
        except (BrokenPipeError, EOFError, ValueError) as error:
            raise DataError(self._last_words(), hint="if memory ran out, lower data.workers") from error
        failure, lengths, unknown, tokens = answer
        if failure:
            raise DataError(f"tokenizing failed: {failure.decode('utf-8', 'replace')}")
        return Encoded(
            np.frombuffer(tokens, self._framing.dtype),
            np.frombuffer(lengths, np.int64),
            np.frombuffer(unknown, np.int64),
            sizes,
        )

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        code = self._process.returncode
        if code is None:
            return "a tokenizing process stopped answering"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"a tokenizing process {how}"

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """End the process: it leaves when its input closes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _send(stream: IO[bytes], *parts: bytes) -> None:
    for part in parts:
        stream.write(_HEAD.pack(len(part)))
        stream.write(part)
    stream.flush()


def _receive(stream: IO[bytes], count: int) -> list[bytes]:
    parts = []
    for _ in range(count):
        head = stream.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise EOFError
        (size,) = _HEAD.unpack(head)
        part = stream.read(size)
        if len(part) < size:
            raise EOFError
        parts.append(part)
    return parts


def _serve(settings: dict[str, Any], requests: IO[bytes], answers: IO[bytes]) -> None:
    """The worker's life: load the tokenizer, answer batches until the input ends."""
    from trainwright.data.tokenizers import load_tokenizer

    framing = Framing(settings["bos"], settings["eos"], settings["unknown"], settings["dtype"])
    tokenizer: Tokenizer | None = None
    while True:
        try:
            sizes, flags, raw = _receive(requests, 3)
        except EOFError:
            return
        try:
            if tokenizer is None:
                tokenizer = load_tokenizer(settings["folder"])
            if tokenizer.fingerprint != settings["fingerprint"]:
                raise DataError(f"the tokenizer in {settings['folder']} changed while it was in use")
            ends = np.cumsum(np.frombuffer(sizes, np.int64)).tolist()
            texts = [raw[a:b].decode("utf-8") for a, b in zip([0, *ends], ends, strict=False)]
            found = encode(tokenizer, texts, list(flags), framing)
        except Exception as error:  # the parent reports it; this process stays usable
            _send(answers, f"{type(error).__name__}: {error}".encode(), b"", b"", b"")
        else:
            _send(answers, b"", found.lengths.tobytes(), found.unknown.tobytes(), found.tokens.tobytes())


def worker_main() -> None:
    """Entry point of a worker process: settings in the first argument, batches on stdin, answers on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes our input
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not into the answers
    with contextlib.suppress(BrokenPipeError):
        _serve(json.loads(sys.argv[1]), sys.stdin.buffer, answers)

"""Records to examples, in this process or in several; the result does not depend on how many.

Workers are plain subprocesses that get the pickled encoder once and then batches of records over their pipes: a
caller's script is not imported a second time, no thread is forked, and a worker that dies is noticed at once. A worker
ends when its input does, so none outlives the build. An encoder that cannot be pickled, or whose class lives in the
caller's script, stays in this process.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trainwright.base.errors import DataError, TrainwrightError
from trainwright.data.examples.example import Encoded, ExampleEncoder

__all__ = ["Refusal", "encode_all", "encode_batch", "portable"]

Record = Mapping[str, Any]
BATCH_RECORDS = 256
TIMED_BATCHES = 2
# Work that is not worth other processes: each imports the task, and torch with it, which takes seconds by itself.
WORTH_SECONDS = 12.0

_HEAD = struct.Struct("<Q")
_MAIN = "from trainwright.data.examples.encoding import worker_main; worker_main()"


@dataclass(frozen=True)
class Refusal:
    """What an encoder said of a record that it cannot use."""

    message: str
    hint: str | None


Result = Encoded | Refusal


def encode_batch(encoder: ExampleEncoder, records: Sequence[Record]) -> list[Result]:
    """What each record becomes; the DataError of one record is its result."""
    results: list[Result] = []
    for record in records:
        try:
            results.append(encoder.encode(record))
        except DataError as error:
            results.append(Refusal(error.message, error.hint))
    return results


def portable(encoder: ExampleEncoder) -> bytes | None:
    """The encoder pickled for a worker, or None where it has to stay in this process."""
    try:
        content = pickle.dumps(encoder, protocol=pickle.HIGHEST_PROTOCOL)
        _NoMain(io.BytesIO(content)).load()
    except Exception:  # pickling raises what the classes raise; staying here is always right
        return None
    return content


class _NoMain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "__main__":
            raise pickle.UnpicklingError(f"{name} is of the caller's script")
        return super().find_class(module, name)


def encode_all(
    encoder: ExampleEncoder, batches: Iterator[Sequence[Record]], workers: int, records: int
) -> Iterator[tuple[Sequence[Record], list[Result]]]:
    """Batches and what their records become, in order; at most two batches a worker are in flight.

    The first batches are encoded here and timed; workers are started for the rest where that would take long.

    Args:
        workers: processes at most.
        records: of all batches together.
    """
    began, done = time.perf_counter(), 0
    for batch in itertools.islice(batches, TIMED_BATCHES):
        yield batch, encode_batch(encoder, batch)
        done += len(batch)
    left = (time.perf_counter() - began) * (records - done) / max(done, 1)
    content = portable(encoder) if workers > 1 and left > WORTH_SECONDS else None
    if content is None:
        for batch in batches:
            yield batch, encode_batch(encoder, batch)
        return
    with _Pool(content, workers) as pool:
        waiting: deque[tuple[Sequence[Record], Any]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(batch)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()


class _Pool:
    """Worker processes, each fed by one thread at a time."""

    def __init__(self, encoder: bytes, workers: int) -> None:
        self._workers = [_Worker(encoder) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="encode")

    def submit(self, batch: Sequence[Record]) -> Any:
        return self._executor.submit(self._encode, batch)

    def _encode(self, batch: Sequence[Record]) -> list[Result]:
        worker = self._idle.get()
        try:
            return worker.encode(batch)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for worker in self._workers:  # unblocks the threads that wait for an answer
                worker.process.kill()
        self._executor.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()


class _Worker:
    """One encoding subprocess."""

    def __init__(self, encoder: bytes) -> None:
        package_root = str(Path(__file__).resolve().parents[3])
        environment = dict(os.environ)
        # the same search path, so that the encoder's module is found wherever the caller's program found it
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, *sys.path]))
        environment["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
        environment["OMP_NUM_THREADS"] = "1"
        self.process = subprocess.Popen(
            [sys.executable, "-c", _MAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._encoder: bytes | None = encoder

    def encode(self, batch: Sequence[Record]) -> list[Result]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            if self._encoder is not None:
                _send(self.process.stdin, self._encoder)
                self._encoder = None
            _send(self.process.stdin, pickle.dumps(list(batch), protocol=pickle.HIGHEST_PROTOCOL))
            answer = pickle.loads(_receive(self.process.stdout))
        except (BrokenPipeError, EOFError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)
            raise DataError(
                f"an encoding process ended with code {self.process.returncode}",
                hint="if memory ran out, lower data.workers",
            ) from error
        if isinstance(answer, str):
            raise RuntimeError(f"encoding failed in a worker:\n{answer}")
        found: list[Result] = answer
        return found

    def close(self) -> None:
        """End the process: it leaves when its input closes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def _send(stream: IO[bytes], content: bytes) -> None:
    stream.write(_HEAD.pack(len(content)))
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise EOFError
    (size,) = _HEAD.unpack(head)
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def worker_main() -> None:
    """Entry point of a worker process: the encoder, then batches on stdin; answers on stdout."""
    import traceback

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes our input
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not into the answers
    encoder: ExampleEncoder | None = None
    with contextlib.suppress(BrokenPipeError, EOFError):
        content = _receive(sys.stdin.buffer)
        while True:
            batch = _receive(sys.stdin.buffer)
            try:
                if encoder is None:
                    encoder = pickle.loads(content)
                found: list[Result] | str = encode_batch(encoder, pickle.loads(batch))
            except TrainwrightError as error:
                found = str(error)
            except Exception:  # the parent reports it; this process stays usable
                found = traceback.format_exc()
            _send(answers, pickle.dumps(found, protocol=pickle.HIGHEST_PROTOCOL))

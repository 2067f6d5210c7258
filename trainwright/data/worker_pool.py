"""Worker processes that all do one job: requests go out over pipes, answers come back in order.

Workers are plain subprocesses that get the pickled job once and then length-prefixed, pickled requests: a caller's
script is not imported a second time (it needs no `if __name__ == "__main__"`), no thread is forked, and a worker that
dies is noticed at once. A worker ends when its input does, so none outlives the program that started it.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

from trainwright.base.errors import DataError, TrainwrightError

__all__ = ["WorkerPool", "portable"]

Batch = TypeVar("Batch")

_HEAD = struct.Struct("<Q")
_MAIN = "from trainwright.data.worker_pool import worker_main; worker_main()"


def portable(job: Callable[[Any], Any]) -> bool:
    """Whether a worker can do this job: it can be pickled, and nothing of it lives in the caller's script, which
    workers do not import."""
    try:
        _NoMain(io.BytesIO(_packed(job))).load()
    except Exception:  # pickling raises what the classes raise
        return False
    return True


class _NoMain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "__main__":
            raise pickle.UnpicklingError(f"{name} is of the caller's script")
        return super().find_class(module, name)


class WorkerPool:
    """`workers` processes, each fed by one thread at a time. Use as a context manager: an error kills the workers.

    Args:
        job: makes an answer of a request. Workers get it pickled and import its module: it must be `portable`.
        name: what messages call a worker: "a tokenizing process".
    """

    def __init__(self, job: Callable[[Any], Any], workers: int, name: str) -> None:
        content = _packed(job)
        self._workers = [_Worker(content, name) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="feed")

    def submit(self, request: Any) -> Future[Any]:
        """Start on a request: any value that can be pickled.

        The result raises the TrainwrightError that the job raised, RuntimeError with the worker's traceback for any
        other exception, and DataError where the process died.
        """
        return self._executor.submit(self._answer, request)

    def map(self, batches: Iterable[Batch], request: Callable[[Batch], Any]) -> Iterator[tuple[Batch, Any]]:
        """Each batch and the answer to its request, in order; at most two batches a worker are in flight."""
        waiting: deque[tuple[Batch, Future[Any]]] = deque()
        for batch in batches:
            waiting.append((batch, self.submit(request(batch))))
            if len(waiting) > 2 * len(self._workers):
                first, answer = waiting.popleft()
                yield first, answer.result()
        while waiting:
            first, answer = waiting.popleft()
            yield first, answer.result()

    def _answer(self, request: Any) -> Any:
        worker = self._idle.get()
        try:
            return worker.answer(request)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for worker in self._workers:  # unblocks the threads that wait for an answer
                worker.process.kill()
        self._executor.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()


@dataclass(frozen=True)
class _Bug:
    """The traceback of what a job raised that is not the user's to mend."""

    trace: str


class _Worker:
    """One subprocess. Used by one thread at a time."""

    def __init__(self, job: bytes, name: str) -> None:
        self._job: bytes | None = job
        self._name = name
        package_root = str(Path(__file__).resolve().parents[2])
        environment = dict(os.environ)
        # the same search path, so that the job's module is found wherever the caller's program found it
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, *sys.path]))
        # one thread each: the processes are the parallelism
        environment["TOKENIZERS_PARALLELISM"] = "false"
        environment["OMP_NUM_THREADS"] = "1"
        self.process = subprocess.Popen(
            [sys.executable, "-c", _MAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def answer(self, request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            if self._job is not None:
                _send(self.process.stdin, self._job)
                self._job = None
            _send(self.process.stdin, _packed(request))
            answer = pickle.loads(_receive(self.process.stdout))
        except (BrokenPipeError, EOFError) as error:
            raise DataError(self._last_words(), hint="if memory ran out, lower data.workers") from error
        if isinstance(answer, TrainwrightError):
            raise answer
        if isinstance(answer, _Bug):
            raise RuntimeError(f"{self._name} failed:\n{answer.trace}")
        return answer

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        code = self.process.returncode
        if code is None:
            return f"{self._name} stopped answering"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{self._name} {how}"

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
    """Entry point of a worker process: the job, then requests on stdin; answers on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes our input
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not into the answers
    job: Callable[[Any], Any] | None = None
    with contextlib.suppress(BrokenPipeError, EOFError):
        content = _receive(sys.stdin.buffer)
        while True:
            request = _receive(sys.stdin.buffer)
            try:
                if job is None:
                    job = pickle.loads(content)
                answer = _packed(job(pickle.loads(request)))
            except TrainwrightError as error:
                answer = _packed(error)
            except Exception:  # the parent reports it; this process stays usable
                answer = _packed(_Bug(traceback.format_exc()))
            _send(answers, answer)


def _packed(value: Any) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)

"""Several processes that share a job: whose share is which, and the worker processes that a job starts by itself."""

import io
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.forkserver import ensure_running
from typing import TypeVar

from effir_search.errors import UserError
from effir_search.indexing.shard import WHOLE, Shard
from effir_search.log_messages import show_messages

logger = logging.getLogger(__name__)

Job = TypeVar("Job")
# The variables in which a launcher says a process' number and their count.
LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
# Seconds a worker has to leave after SIGTERM, before it is killed.
GRACE = 10


def this_shard(num_shards: int | None, shard_id: int | None) -> Shard:
    """Return the shard that options say, or else torchrun's (RANK, WORLD_SIZE) or srun's variables, or the whole.

    Of SLURM's variables those of a step count. A batch script and the shell of salloc are one process, though they have
    SLURM_NTASKS, the tasks that a step may have, and SLURM_PROCID too.

    Raises:
        ValueError: One option without the other, a number outside the count, or variables that are no numbers.
    """
    if num_shards is None and shard_id is None:
        for number, count in LAUNCHERS:
            if number in os.environ and count in os.environ:
                try:
                    shard = Shard(int(os.environ[number]), int(os.environ[count]))
                except ValueError:
                    shard = Shard(-1, 0)
                if not 0 <= shard.number < shard.count:
                    variables = f"{number}={os.environ[number]} and {count}={os.environ[count]}"
                    raise UserError(f"{variables} name no shard; unset them, or give --num-shards and --shard-id")
                if shard.count > 1:
                    logger.info("shard %d of %d, as %s and %s say", *shard, number, count)
                return shard
        return WHOLE
    if num_shards is None or shard_id is None:
        raise UserError("--num-shards and --shard-id go together")
    if shard_id >= num_shards:
        raise UserError(f"--shard-id {shard_id}: must be below --num-shards {num_shards}, counted from 0")
    return Shard(shard_id, num_shards)


def worker_devices(workers: int | None, devices: str | None) -> list[str]:
    """Return the device of each worker that options ask for: ``["cuda:0", "cuda:1"]``, or "cpu" so many times.

    Raises:
        ValueError: Both options, or an empty or repeated device.
    """
    if workers is not None and devices is not None:
        raise UserError("give --workers (on the CPU) or --devices, not both")
    names = [name.strip() for name in devices.split(",")] if devices is not None else ["cpu"] * (workers or 0)
    if devices is not None and (not all(names) or len(set(names)) < len(names)):
        raise UserError(f"--devices {devices}: names of devices, each once, as in cuda:0,cuda:1")
    return names


def run_workers(
    work: Callable[[Job], object], jobs: Sequence[Job], *, watch: Callable[[], object] = lambda: None
) -> None:
    """Do each job in a process of its own, all at once; all end well, or none goes on.

    Workers end with this process, however it ends: each waits for that in a thread. They show no progress bars, and
    of their messages only the first one's.

    Args:
        work: A function of a module, so that a new process can import it.
        jobs: What it is called with, one for each process.
        watch: Called every second, and once more at the end.

    Raises:
        ValueError: A worker raised it.
        OSError: A worker raised it, or was killed.
        RuntimeError: A worker raised any other error. The worker's own traceback is a note of what is raised.
    """
    context = _context(work.__module__, len(jobs))
    workers = []
    try:
        for number, job in enumerate(jobs):
            ours, theirs = context.Pipe(duplex=False)
            level = logging.ERROR if number else logging.getLogger().getEffectiveLevel()
            worker = context.Process(target=_work, args=(work, job, level, theirs, dict(os.environ)), daemon=True)
            try:
                worker.start()
            except EOFError as error:
                raise OSError("a worker could not be started; the same command continues") from error
            theirs.close()  # so that a worker's end is seen here
            workers.append((worker, ours))
        at_work = {worker.sentinel: (worker, connection) for worker, connection in workers}
        while at_work:
            ended = wait(list(at_work), timeout=1)
            for worker, connection in at_work.values():
                # A worker whose error is longer than the pipe waits until it is taken, and ends then.
                if (error := _error_of(connection)) is not None:
                    worker.join(GRACE)
                    raise error
            for sentinel in ended:
                worker, connection = at_work.pop(sentinel)
                worker.join()
                if worker.exitcode:
                    raise _reason(worker.exitcode, connection)
            watch()
    finally:
        for worker, _ in workers:
            worker.terminate()
        for worker, _ in workers:
            worker.join(GRACE)
            worker.kill()


def _context(module: str, count: int) -> BaseContext:
    """Return what starts workers: several ones on Linux are forked from a process that imports a module only once.

    That process begins here, unless it is there already; it computes nothing, has nothing on a GPU, and ends with this
    one. Elsewhere, and where it cannot begin, each worker is a new process.
    """
    context = multiprocessing.get_context("spawn")
    if sys.platform != "linux" or count == 1:
        return context
    before = dict(os.environ)
    # Else it would take modules from the folder that it begins in first (CPython before 3.12.8).
    os.environ |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        forking = multiprocessing.get_context("forkserver")
        forking.set_forkserver_preload([module])
        ensure_running()
        context = forking
    except OSError as error:  # such as a TMPDIR too long for the name of a socket
        logger.debug("workers are not forked: %s", error)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _error_of(connection: Connection) -> Exception | None:
    """Return what a worker has raised, if it has."""
    try:
        return connection.recv() if connection.poll() else None
    except EOFError:
        return None


def _reason(exitcode: int, connection: Connection) -> Exception:
    """Return what a worker that has ended raised, or how it ended without a word."""
    how = f"was killed by signal {-exitcode}" if exitcode < 0 else f"ended with status {exitcode}"
    error = _error_of(connection)
    return error or OSError(f"a worker {how}; the others were stopped, and the same command continues")


class _NotATerminal(io.TextIOWrapper):
    """Standard error for workers: progress bars, which look for a terminal, stay silent."""

    def isatty(self) -> bool:
        return False


def _work(
    work: Callable[[Job], object], job: Job, level: int, connection: Connection, variables: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.stderr = _NotATerminal(sys.stderr.buffer, line_buffering=True)
    show_messages(level)
    try:
        work(job)
    except Exception as error:
        # Not every exception can be unpickled at the other end; these two kinds, which the command shows, can.
        sent = error if isinstance(error, ValueError | OSError) else RuntimeError(f"{type(error).__name__}: {error}")
        sent.add_note(f"In the worker:\n{traceback.format_exc()}")
        connection.send(sent)
        sys.exit(1)


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)

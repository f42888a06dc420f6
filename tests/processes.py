"""The command in processes forked from one that has imported it all: a start takes a moment, not five seconds."""

import contextlib
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from types import MappingProxyType
from unittest import mock

TESTS = Path(__file__).parent
NONE: Mapping[str, str] = MappingProxyType({})

# By the variables that they were started with; none is that which multiprocessing itself asks, as workers do.
_servers: dict[tuple[tuple[str, str], ...], ForkServer] = {}


def fork_server(variables: Mapping[str, str] = NONE) -> ForkServer:
    """Start what forks processes, of one thread each, unless it runs.

    Args:
        variables: Those that a library reads when it is imported, which it is only once.
    """
    server = _servers.setdefault(tuple(sorted(variables.items())), ForkServer())
    server.set_forkserver_preload(["warm"])
    path = f"{TESTS.parent}{os.pathsep}{TESTS}"
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}):
        server.ensure_running()
    return server


@contextlib.contextmanager
def forked_by(server: ForkServer) -> Iterator[None]:
    """Let processes that start in the block, by the method forkserver, be forked by this one."""
    with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
        yield


class Command:
    """A command at work, with those methods of subprocess.Popen that tests use.

    Args:
        arguments: Of ``effir``.
        environment: Variables to add; of those that a library reads when it is imported see the next.
        server: What forks the process, from ``fork_server``; None = the one that all share.
        cwd: Folder to work in.
        prepare: What the process calls first.
    """

    def __init__(
        self,
        *arguments: object,
        environment: dict[str, str] | None = None,
        server: ForkServer | None = None,
        cwd: Path | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self.args = list(map(str, arguments))
        self._outputs, self._written = tempfile.mkdtemp(), None
        job = (
            self.args,
            os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
            cwd or Path.cwd(),
            prepare,
            self._outputs,
        )
        self._process = multiprocessing.get_context("forkserver").Process(target=_work, args=job)
        with forked_by(server or fork_server()):
            self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self.communicate()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self._process.pid, number)

    def communicate(self) -> tuple[str, str]:
        """Wait for the end, and return what was written to stdout and to stderr."""
        self._process.join()
        if self._written is None:
            files = [Path(self._outputs, name) for name in ("stdout", "stderr")]
            self._written = tuple(file.read_text() if file.exists() else "" for file in files)
            shutil.rmtree(self._outputs)
        return self._written


def run_command(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    command = Command(*arguments, **options)
    stdout, stderr = command.communicate()
    return subprocess.CompletedProcess(command.args, command.returncode, stdout, stderr)


def start_ranks(count: int, *arguments: object) -> list[Command]:
    """Start a command in several processes, with those variables of torchrun that tell them of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [Command(*arguments, environment={name: str(value) for name, value in rank.items()}) for rank in ranks]


def torchrun(*arguments: object) -> subprocess.Popen:
    """Start a command in two new processes, as torchrun does."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "effir_search"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _work(
    arguments: list[str], variables: dict[str, str], cwd: Path, prepare: Callable[[], object] | None, outputs: str
) -> None:
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(Path(outputs, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    if prepare is not None:
        prepare()

    from effir_search.cli import cli

    cli(arguments, prog_name="effir")

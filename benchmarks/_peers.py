"""Peers that live in an environment of their own: made at first use, asked for one block at a time.

JAX and torch in one process would share threads and memory allocators. So a peer is a script that runs under the Python
of ``runs/peers`` (made here with the venv module and pip) and answers lines of JSON; our side and it take turns.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import venv
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "runs" / "peers"
PACKAGES = ("jax>=0.4.30", "optax>=0.2", "numpyro>=0.15")


def peer_python(folder: Path = FOLDER) -> Path:
    """The Python of the peers' environment, which is made if it is not there.

    Raises:
        SystemExit: when the packages cannot be installed.
    """
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if ready.exists() and ready.read_text() == " ".join(PACKAGES):
        return python
    print(f"making an environment for {', '.join(PACKAGES)} in {folder}", flush=True)
    venv.create(folder, with_pip=True)
    done = subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=False)
    if done.returncode:
        raise SystemExit(
            f"The peers {', '.join(PACKAGES)} could not be installed in {folder}; see pip's message above."
        )
    ready.write_text(" ".join(PACKAGES))
    return python


class Peer:
    """A peer's script in a process of its own, on one thread.

    Args:
        script: its name in this folder; or that of a module, which then runs in the repository.
        arguments: of the script.
        python: that runs it.
        env: variables of its environment beside our own.
    """

    def __init__(
        self, script: str, *arguments: Any, python: Path | None = None, env: dict[str, str] | None = None
    ) -> None:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        all_env = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags} | (env or {})
        what = [str(HERE / script)] if script.endswith(".py") else ["-m", script]
        command = [str(python or peer_python()), *what, *map(str, arguments)]
        # a session of its own: what it starts, such as compilers, can be ended with it
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=all_env, cwd=HERE.parent,
            start_new_session=True,
        )  # fmt: skip

    def ask(self, limit: float | None = None, /, **request: Any) -> dict[str, Any]:
        """Its answer to one request.

        Args:
            limit: seconds to wait for it; None for as long as it takes.
            request: what is asked.

        Raises:
            RuntimeError: when it has ended.
            TimeoutError: when there is no answer in time; the peer has then been ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if limit is not None and not select.select([self.process.stdout], [], [], limit)[0]:
            self.end()
            raise TimeoutError(f"No answer to {request} within {limit:g} s.")
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The peer {self.process.args} ended with status {self.process.wait()}.")  # type: ignore[str-bytes-safe]
        return dict(json.loads(answer))

    def end(self) -> None:
        """End it at once, with all that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if error is not None:
            self.end()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def one_core() -> None:
    """Keep this process and those that it starts on one core, as all sides are: threads then have nothing to win."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

"""Peers that live in an environment of their own: made at first use, asked for one block at a time.

JAX and torch in one process would share threads and memory allocators. So a peer is a script that runs under the Python
of ``runs/peers`` (made here with the venv module and pip) and answers lines of JSON; our side and it take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
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
        script: its name in this folder.
        arguments: of the script.
        python: that runs it.
    """

    def __init__(self, script: str, *arguments: Any, python: Path | None = None) -> None:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags}
        command = [str(python or peer_python()), str(HERE / script), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer to one request.

        Raises:
            RuntimeError: when it has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The peer {self.process.args} ended with status {self.process.wait()}.")  # type: ignore[str-bytes-safe]
        return dict(json.loads(answer))

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def one_core() -> None:
    """Keep this process and those that it starts on one core, as all sides are: threads then have nothing to win."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

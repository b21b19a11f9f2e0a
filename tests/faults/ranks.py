"""Two ranks of which one is killed at a random moment, and started again as torchrun does: prints each run as JSON.

Starting Python and torch takes seconds, so this process takes the place of torchrun's agent: it forks the ranks with
torchrun's environment, and when one has died it stops the other and starts both again with the count of restarts one
higher. The arguments of ``fit`` are the same each time, and say to begin a run anew.

    python -m tests.faults.ranks FOLDER KILLS SEED
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from bayesmeta.train import checkpoint
from tests.distributed_ranks import environment, free_port
from tests.faults import driver
from tests.faults.driver import contents, difference, fork

KINDS = [driver.maml, driver.dropout, driver.abml]
#: What torchrun gives its ranks after SIGTERM, before it kills them.
GRACE = 30.0


def rank_of(kind, folder, rank, port, restarts):
    os.environ.update(environment(rank, port))
    os.environ.update(TORCHELASTIC_RUN_ID=folder.name, TORCHELASTIC_RESTART_COUNT=str(restarts))
    # without the ones of the test's own process
    sys.stderr = open(f"{folder}_rank{rank}.txt", "a")  # noqa: SIM115
    kind(folder, False)


def start(kind, folder, restarts):
    port = free_port()
    return [fork(rank_of, kind, folder, rank, port, restarts) for rank in range(2)]


def wait(pid, until):
    """The status of a process, or None when it is still there at that time."""
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    return None


def finish(kind, folder, restarts):
    """Let both go on to their end; returns the seconds."""
    begin = time.monotonic()
    statuses = [os.waitpid(pid, 0)[1] for pid in start(kind, folder, restarts)]
    if any(statuses):
        said = "\n".join(Path(f"{folder}_rank{rank}.txt").read_text() for rank in range(2))
        raise SystemExit(f"{kind.__name__} ended with {statuses}\n{said}")
    return time.monotonic() - begin


def kill(kind, folder, restarts, delay, victim):
    """Kill one rank after so many seconds; returns what became of the other, or None when both had ended by then."""
    pids = start(kind, folder, restarts)
    time.sleep(delay)
    os.kill(pids[victim], signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(pids[victim], 0)[1])
    other = pids[1 - victim]
    if not killed:
        os.waitpid(other, 0)
        return None
    os.kill(other, signal.SIGTERM)
    if wait(other, time.monotonic() + GRACE) is None:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        return "hung"
    return "ended"


def one(kind, reference, seconds, folder, numbers):
    """Kill a rank at a random moment, perhaps again after the restart, and let both come to their end."""
    became, restarts = None, 0
    while became is None:
        name = folder / f"{kind.__name__}_{numbers.getrandbits(48):x}"
        became = kill(kind, name, 0, numbers.uniform(0.2, 1.0) * seconds, numbers.randrange(2))
    step = checkpoint.load(name / "checkpoint.pt")["step"] if (name / "checkpoint.pt").exists() else 0
    restarts += 1
    if numbers.random() < 0.3 and kill(kind, name, 1, numbers.uniform(0.2, 1.0) * seconds, numbers.randrange(2)):
        restarts += 1
    finish(kind, name, restarts)
    found = difference(reference, contents(name))
    return {"kind": kind.__name__, "step": step, "became": became, "restarts": restarts, "difference": found}


def main(folder, kills, seed):
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread of its own
    numbers, references = random.Random(seed), {}
    for kind in KINDS:
        kind(folder / f"{kind.__name__}_warm_up", False)
    for kind in KINDS[: min(len(KINDS), kills)]:
        whole = folder / f"{kind.__name__}_whole"
        seconds = finish(kind, whole, 0)
        references[kind] = contents(whole), seconds
    for i in range(kills):
        kind = KINDS[i % len(KINDS)]
        print(json.dumps(one(kind, *references[kind], folder, numbers)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

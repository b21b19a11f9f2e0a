"""What stops a run, or shall not: signals, a second run, a full disk, too little memory, losses that are not finite."""

import errno
import json
import math
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.train import checkpoint, lock, signals
from bayesmeta.train.loop import MAX_SKIPPED
from tests.test_fit import OPTIONS, VALIDATION, make, same, state, train

STOPS = (signal.SIGINT, signal.SIGTERM)


def during(method, step, action):
    """Do something within the loss of a training step; the method is the same otherwise."""
    loss, calls = method.loss, []

    def with_action(batch, **options):
        value = loss(batch, **options)
        if method.training:
            calls.append(1)
            if len(calls) == step:
                action()
        return value

    method.loss = with_action
    return method


def send(*numbers):
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_the_step_and_then_stops(number, error, tmp_path):
    whole, resumed = make(), make()
    train(whole, 40, out=tmp_path / "whole", **OPTIONS)
    before = [signal.getsignal(n) for n in STOPS]
    with pytest.raises(error) as caught:
        train(during(make(), 23, send(number)), 40, out=tmp_path / "run", **OPTIONS)
    if error is KeyboardInterrupt:
        assert "after step 23; its checkpoint is in" in str(caught.value)
    else:
        assert caught.value.code == 143
    assert [signal.getsignal(n) for n in STOPS] == before
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 23
    train(resumed, 40, out=tmp_path / "run", resume=True, **OPTIONS)
    assert same(state(whole), state(resumed))
    logs = [(tmp_path / n / "log.jsonl").read_text().splitlines() for n in ("whole", "run")]
    assert [json.loads(line)["step"] for line in logs[0]] == [json.loads(line)["step"] for line in logs[1]]


@pytest.mark.parametrize("first", STOPS)
def test_a_second_ctrl_c_stops_at_once(first, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "APART", 0.05)

    def twice():
        os.kill(os.getpid(), first)
        time.sleep(0.06)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="before the step was finished"):
        train(during(make(), 23, twice), 40, out=tmp_path, **OPTIONS)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 20
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(make(), 21, out=tmp_path, resume=True, **OPTIONS)  # the folder was let go of


@pytest.mark.parametrize(
    ("numbers", "error"),
    [
        ((signal.SIGTERM,) * 5, SystemExit),
        ((signal.SIGINT,) * 3, KeyboardInterrupt),  # a terminal's and torchrun's, at once
        ((signal.SIGTERM, signal.SIGINT), SystemExit),
        ((signal.SIGINT, signal.SIGTERM), KeyboardInterrupt),
    ],
)
def test_a_signal_that_comes_several_times_at_once_is_one(numbers, error, tmp_path):
    with pytest.raises(error) as caught:
        train(during(make(), 23, send(*numbers)), 40, out=tmp_path, **OPTIONS)
    assert caught.value.code == 143 if error is SystemExit else "after step 23" in str(caught.value)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 23


def test_a_second_sigterm_is_none_however_late(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "APART", 0.0)
    with pytest.raises(SystemExit):
        train(during(make(), 23, send(signal.SIGTERM, signal.SIGTERM)), 40, out=tmp_path, **OPTIONS)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 23


def test_a_signal_that_the_ranks_did_not_agree_on_comes_after_the_run():
    """What one rank got when all had said that none came: as without fit, not lost, and not an end of one rank."""
    received = []
    mine = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with signals.Signals() as held:
            os.kill(os.getpid(), signal.SIGTERM)
            assert held.received is signal.SIGTERM
            held._before[signal.SIGTERM] = lambda number, frame: received.append(number)
            held.settle(None)
            assert received == [signal.SIGTERM]
        with pytest.raises(SystemExit), signals.Signals() as held:
            held.settle(signal.SIGTERM)  # of another rank
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_without_a_folder_the_method_has_the_step(tmp_path):
    whole, stopped = make(), make()
    train(whole, 5)
    with pytest.raises(KeyboardInterrupt, match="after step 5; the method has the parameters"):
        train(during(stopped, 5, send(signal.SIGINT)), 40)
    assert same(state(whole), state(stopped))


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    method = make()
    options = {"optimizer": lambda p: torch.optim.SGD(p, math.inf), "out": tmp_path}
    with pytest.raises(KeyboardInterrupt, match="not finite and were not saved"):
        train(during(method, 1, send(signal.SIGINT)), 40, **options)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_handlers_of_the_callers_own_are_left_alone():
    received = []
    mine = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        during_fit = []
        train(during(make(), 3, lambda: during_fit.append(signal.getsignal(signal.SIGTERM))), 5)
        train(during(make(), 3, send(signal.SIGTERM)), 5)
        assert during_fit == [handler]
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_in_another_thread_handlers_are_left_alone():
    results, before = [], [signal.getsignal(n) for n in STOPS]
    method = during(make(), 3, lambda: results.append([signal.getsignal(n) for n in STOPS]))
    thread = threading.Thread(target=lambda: results.append(train(method, 5).steps))
    thread.start()
    thread.join()
    assert results == [before, 5]


# -- two runs in one folder -------------------------------------------------------------------------------------------

HOLDER = """
import fcntl, json, os, socket, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
os.pwrite(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_a_folder_in_use_is_refused_until_its_process_is_dead(options, tmp_path):
    train(make(), 5, out=tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    command = [sys.executable, "-c", HOLDER, str(tmp_path / lock.LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(errors.RunFolderError, match=f"in use by a run of process {process.pid} on"):
            train(make(), 10, out=tmp_path, **options)
        assert (tmp_path / "checkpoint.pt").read_bytes() == before
        process.kill()
        process.wait()
    assert json.loads((tmp_path / lock.LOCK).read_text())["pid"] == process.pid  # it could not tidy up
    train(make(), 10, out=tmp_path, **options)
    assert not (tmp_path / lock.LOCK).exists()


def test_two_runs_of_one_process(tmp_path):
    other = []

    def second():
        with pytest.raises(errors.RunFolderError, match="Another run of this very process") as caught:
            train(make(), 5, out=tmp_path / ".." / tmp_path.name, overwrite=True)
        other.append(caught.value)

    train(during(make(), 3, second), 5, out=tmp_path)
    assert len(other) == 1


def test_a_lock_of_another_machine_counts_for_two_minutes(tmp_path):
    train(make(), 5, out=tmp_path)
    path = tmp_path / lock.LOCK
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(errors.RunFolderError, match=r"process 1 on elsewhere \d seconds ago"):
        train(make(), 10, out=tmp_path, resume=True)
    assert json.loads(path.read_text())["host"] == "elsewhere"  # a refusal is no sign of life
    ago = path.stat().st_mtime - lock.STALE - 1
    os.utime(path, (ago, ago))
    train(make(), 10, out=tmp_path, resume=True)


@pytest.fixture
def restarted(monkeypatch):
    """torchrun's environment of one process that was started again."""
    values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
    values |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "job7", "TORCHELASTIC_RESTART_COUNT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("said", [{"job": "job7"}, {}])
def test_a_restart_takes_the_lock_of_its_own_jobs_lost_machine(said, restarted, tmp_path):
    """Its own by what the lock says, or, of a lock that does not, by the job that began the run."""
    train(make(), 5, out=tmp_path)
    path = tmp_path / lock.LOCK
    path.write_text(json.dumps({"pid": 1, "host": "lost", **said}))
    assert train(make(), 10, out=tmp_path).steps == 10
    assert not path.exists()


@pytest.mark.parametrize("change", ["another job's lock", "not started again"])
def test_no_other_start_takes_it(change, restarted, tmp_path, monkeypatch):
    train(make(), 5, out=tmp_path)
    if change == "not started again":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    name = "job7" if change == "not started again" else "job8"
    (tmp_path / lock.LOCK).write_text(json.dumps({"pid": 1, "host": "lost", "job": name}))
    with pytest.raises(errors.RunFolderError, match=r"process 1 on lost \d seconds ago"):
        train(make(), 10, out=tmp_path, resume=True)


def test_a_restart_waits_where_it_cannot_see_who_lives(restarted, tmp_path, monkeypatch):
    """Without locks of the system: until the lock is stale, no longer, and not at all for another job."""
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "_LOOK", 0.05)
    train(make(), 5, out=tmp_path)
    path = tmp_path / lock.LOCK
    path.write_text(json.dumps({"pid": 1, "host": "lost", "job": "job7"}))
    ago = path.stat().st_mtime - lock.STALE + 0.4
    os.utime(path, (ago, ago))
    begin = time.monotonic()
    with pytest.warns(UserWarning, match="process 1 on lost.*waiting for a sign of its end, 120 seconds at most"):
        assert train(make(), 10, out=tmp_path).steps == 10
    assert time.monotonic() - begin > 0.3
    path.write_text(json.dumps({"pid": 1, "host": "lost", "job": "job8"}))
    with pytest.raises(errors.RunFolderError, match="seconds ago"):
        train(make(), 12, out=tmp_path)


def test_a_restart_does_not_wait_for_ever(restarted, tmp_path, monkeypatch):
    """A holder that lives after all, as the system's lock says."""
    train(make(), 5, out=tmp_path)
    monkeypatch.setattr(lock, "_LOOK", 0.05)
    monkeypatch.setattr(lock, "STALE", -0.8)  # with the second more, 0.2 seconds
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / lock.LOCK)], stdout=subprocess.PIPE
    ) as process:  # fmt: skip
        assert process.stdout.readline() == b"ready\n"
        with (
            pytest.warns(UserWarning, match="waiting for a sign of its end"),
            pytest.raises(errors.RunFolderError, match=f"in use by a run of process {process.pid}"),
        ):
            train(make(), 10, out=tmp_path)
        process.kill()


def test_without_locks_of_the_system_this_machines_lock_counts_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    train(make(), 5, out=tmp_path)
    path = tmp_path / lock.LOCK
    path.write_text(json.dumps({"pid": 1, "host": socket.gethostname()}))
    with pytest.raises(errors.RunFolderError, match="seconds ago"):
        train(make(), 10, out=tmp_path, resume=True)
    os.utime(path, (0, 0))
    train(make(), 10, out=tmp_path, resume=True)


def test_a_lock_that_was_let_go_of_meanwhile_is_not_held(tmp_path, monkeypatch):
    """Else two runs would hold a lock, one of them on a file that has no name any more."""
    take, calls = lock.Lock._lock, []

    def late(self):
        if len(calls) < 2:
            self.path.unlink()
            calls.append(self.path.write_text("") if len(calls) == 1 else None)
        return take(self)

    monkeypatch.setattr(lock.Lock, "_lock", late)
    held = lock.Lock(tmp_path)
    assert len(calls) == 2
    assert os.fstat(held._file).st_ino == held.path.stat().st_ino
    assert json.loads(held.path.read_text())["pid"] == os.getpid()
    held.release()
    assert not held.path.exists()


def test_a_lock_gives_signs_of_life(tmp_path, monkeypatch):
    held = lock.Lock(tmp_path)
    os.utime(held.path, (0, 0))
    held.beat()
    assert held.path.stat().st_mtime == 0  # not at every step
    monkeypatch.setattr(lock, "_BEAT", -1.0)
    held.beat()
    assert held.path.stat().st_mtime > 1e9
    held.release()
    held.release()  # a second time nothing happens
    lock.Lock(tmp_path).release()


def test_a_failed_start_lets_the_folder_go(tmp_path):
    train(make(), 5, out=tmp_path)
    for options in ({}, {"resume": True, "seed": 7}):
        with pytest.raises(errors.BayesMetaError):
            train(make(), 10, out=tmp_path, **options)
    train(make(), 10, out=tmp_path, resume=True)


# -- disks ------------------------------------------------------------------------------------------------------------


class SmallFiles:
    """No file of this process can grow above so many bytes: writes fail in the system, halfway, as on a full disk."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("size", [100, 3_000, 9_000])
def test_a_full_disk_costs_nothing_but_the_steps_since(size, tmp_path):
    whole, resumed = make(), make()
    train(whole, 40, out=tmp_path / "whole", **OPTIONS)
    train(make(), 21, out=tmp_path / "run", **OPTIONS)  # validated at its end, as the whole one at this step
    kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with SmallFiles(size), pytest.raises(errors.RunFolderError, match="could not be written"):
        train(make(), 40, out=tmp_path / "run", resume=True, **OPTIONS)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == kept
    assert not list((tmp_path / "run").glob("*.tmp*"))
    train(resumed, 40, out=tmp_path / "run", resume=True, **OPTIONS)
    assert same(state(whole), state(resumed))


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(errors.RunFolderError, match=r"No space left on device\. Free some space"):
        train(make(), 5, out=tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    if sys.platform.startswith("linux"):
        with pytest.raises(errors.RunFolderError, match="cannot be written"):
            train(make(), 5, out="/proc/bayesmeta")
    opened = os.open

    def read_only(path, flags, *rest, **options):
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(errors.RunFolderError, match=r"cannot be written: .*Read-only.*Choose a folder"):
        train(make(), 5, out=tmp_path)


def test_a_disk_without_hard_links_copies(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", none)
    train(make(), 20, out=tmp_path, **OPTIONS)
    steps = [checkpoint.load(tmp_path / n)["step"] for n in ("checkpoint.previous.pt", "checkpoint.pt")]
    assert steps == [10, 20]


# -- memory -----------------------------------------------------------------------------------------------------------


def small_device(method, most, error):
    """Fail as an allocator does on more than so many tasks at a time."""
    loss = method.loss

    def limited(batch, **options):
        if batch.num_tasks > most:
            raise error
        return loss(batch, **options)

    method.loss = limited
    return method


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_too_little_memory_names_the_chunk_to_try(error):
    chunk, tried = None, []
    for _ in range(3):
        with pytest.raises(errors.DeviceMemoryError, match=r"Set chunk=\d:") as caught:
            train(small_device(make(), 3, error), 3, tasks_per_step=16, chunk=chunk)
        chunk = caught.value.chunk
        assert f"Set chunk={chunk}:" in str(caught.value)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.chunk) == (str(caught.value), chunk)
        tried.append(chunk)
    method = small_device(make(), 3, error)
    train(method, 3, tasks_per_step=16, chunk=chunk)
    assert tried == [8, 4, 2]
    expected = make()
    train(expected, 3, tasks_per_step=16, chunk=2)
    assert same(state(method), state(expected))


def test_one_task_at_a_time_that_is_too_much():
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(errors.DeviceMemoryError, match="one task at a time already") as caught:
        train(small_device(make(), 0, error), 3, chunk=1)
    assert caught.value.chunk is None


def test_validation_names_its_own_option():
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(errors.DeviceMemoryError, match=r"Validation at step 2 .*Set validation_chunk=5:"):
        train(small_device(make(), 8, error), 3, validation=VALIDATION, validate_every=2)


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match=r"^shapes$"):
        train(small_device(make(), 0, RuntimeError("shapes")), 3)


def test_what_filled_the_memory_is_let_go_of():
    held = []

    class Greedy(torch.nn.Linear):
        def prepare(self, batch):
            pass

        def loss(self, batch, *, generator=None):
            large = torch.zeros(1000)
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(errors.DeviceMemoryError) as caught:
        train(Greedy(1, 1), 3)
    assert held[0]() is None
    assert caught.value.__cause__ is not None


# -- losses that are not finite -----------------------------------------------------------------------------------


class Line(torch.nn.Module):
    """A line without adaptation, whose loss, or gradient alone, is not finite where it is told so."""

    def __init__(self, bad=(), gradient=False):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.3))
        self.register_buffer("seen", torch.zeros(()))
        self.bad, self.gradient, self.calls = set(bad), gradient, 0

    def prepare(self, batch):
        pass

    def loss(self, batch, *, generator=None):
        loss = (self.slope * batch.query.x.squeeze(-1) - batch.query.y).square().mean()
        self.calls += 1
        self.seen += loss.detach()
        if self.calls in self.bad:
            self.seen += math.nan
            # the square root of 0 is finite, its slope is not
            return loss + ((0.0 * self.slope).sqrt() if self.gradient else math.inf)
        return loss


@pytest.mark.parametrize("gradient", [False, True])
def test_a_skipped_step_changes_nothing(gradient):
    method, bad = Line(bad=[3, 4, 9], gradient=gradient), {3, 4, 9}
    options = {"optimizer": lambda p: torch.optim.Adam(p, 0.05), "schedule": bm.schedules.cosine(12)}
    with pytest.warns(UserWarning, match="at step 3. The step is skipped"):
        result = train(method, 12, nan_policy="skip", log_every=1, **options)
    assert result.skipped == 3
    assert [h.get("skipped", 0) for h in result.history] == [0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3]
    assert all(math.isfinite(h["loss"]) for h in result.history)

    # the same by hand: tasks are drawn at each step, the bad ones are thrown away
    other = Line()
    optimizer = torch.optim.Adam(other.parameters(), 0.05)
    schedule = bm.schedules.cosine(12)(optimizer)
    generator = torch.Generator().manual_seed(3)
    for step in range(1, 13):
        batch = bm.tasks.Sinusoid(noise=0.1).sample(8, support=10, query=10, generator=generator)
        if step not in bad:
            optimizer.zero_grad()
            other.loss(batch).backward()
            optimizer.step()
            schedule.step()
    assert same(state(method), state(other))
    with pytest.raises(errors.NonFiniteLossError, match="at step 3"):
        train(Line(bad=bad, gradient=gradient), 12, **options)


def test_a_run_that_only_skips_stops():
    method = Line(bad=range(5, 10_000))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(errors.NonFiniteLossError) as caught:
            train(method, 1_000, nan_policy="skip")
    assert caught.value.step == 4 + MAX_SKIPPED
    assert f"{MAX_SKIPPED} steps in a row" in str(caught.value)
    assert len([w for w in said if "skipped" in str(w.message)]) == 1


def test_a_resumed_run_may_skip_what_stopped_it(tmp_path):
    with pytest.raises(errors.NonFiniteLossError):
        train(Line(bad=[7]), 12, out=tmp_path, checkpoint_every=5)
    method = Line(bad=[2])  # the seventh step is the second after step 5
    with pytest.warns(UserWarning, match="skipped"):
        assert train(method, 12, out=tmp_path, checkpoint_every=5, resume=True, nan_policy="skip").skipped == 1


def test_policies_that_are_not_known():
    with pytest.raises(errors.OptionError, match="nan_policy 'ignore'"):
        train(make(), 5, nan_policy="ignore")
    with pytest.raises(errors.OptionError, match="resume is 'last'"):
        train(make(), 5, resume="last")


def test_a_run_killed_before_it_wrote_anything_is_resumed_from_the_start(tmp_path):
    (tmp_path / lock.LOCK).write_text("{}")  # all that it left; the system let go of the lock itself
    resumed = train(make("maml"), steps=5, out=tmp_path, resume=True)
    assert same(state(resumed.method), state(train(make("maml"), steps=5).method))
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    with pytest.raises(errors.RunFolderError, match="no run to resume"):  # the control: no run was begun
        train(make("maml"), steps=5, out=nothing, resume=True)

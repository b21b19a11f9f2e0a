"""Survival, the rest: kills between operations on files, each piece of a run's state, a disk that is really full."""

import ast
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.ops import files
from bayesmeta.tabular.lines import Lines
from bayesmeta.tabular.rates import Rates
from bayesmeta.train import checkpoint
from tests.faults.driver import difference
from tests.faults.test_damage import Evil, flip
from tests.faults.test_kills import FORKS
from tests.faults.test_stops import SmallFiles
from tests.test_fit import VALIDATION, make, same

TASKS = bm.tasks.Sinusoid(noise=0.1)
POINTS = Path(__file__).with_name("points.py")
EVERY = 2  # steps between the checkpoints there

# -- kills between operations on files --------------------------------------------------------------------------------


def kill_at_points(stride):
    """What became of a training that was killed before every so manieth operation on files."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="bayesmeta-points-", dir=place))
    alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    try:
        command = [sys.executable, str(POINTS), str(folder), str(stride)]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **alone})
    finally:
        shutil.rmtree(folder)
    assert result.returncode == 0, result.stderr
    first, *found = [json.loads(line) for line in result.stdout.splitlines()]
    assert first["points"] > 30
    assert None not in found
    assert len(found) == -(-first["points"] // stride)
    return found


def check_points(found):
    """Bit-identical: parameters, optimizer, schedule, early stopping, generators, log and curves."""
    assert [r for r in found if r["difference"] is not None] == []
    # no more is lost than the steps since the last checkpoint
    assert all(0 <= r["reached"] - r["kept"] <= EVERY for r in found)
    assert len({r["kept"] for r in found}) > 2


@pytest.mark.skipif(not FORKS, reason="forks processes of torch, and looks into /proc")
def test_kills_between_operations_on_files():
    check_points(kill_at_points(10))


@pytest.mark.slow
@pytest.mark.skipif(not FORKS, reason="forks processes of torch, and looks into /proc")
def test_kills_between_any_two_operations_on_files():
    found = kill_at_points(1)
    check_points(found)
    assert {r["reached"] - r["kept"] for r in found} == {0, 1, EVERY}


# -- each piece of a run's state counts -------------------------------------------------------------------------------


class Dropout(torch.nn.Module):
    """A line with dropout, whose noise comes from torch's global generators, and a count of its steps."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        self.register_buffer("steps", torch.zeros(()))

    def prepare(self, batch):
        pass

    def loss(self, batch, *, generator=None):
        if self.training:
            self.steps += 1
        return (self.network(batch.query.x).squeeze(-1) - batch.query.y).square().mean()


def run(folder, steps, resume=False, device="cpu"):
    method = Dropout()
    options = {
        "optimizer": lambda p: torch.optim.AdamW(p, 0.02),
        "schedule": bm.schedules.cosine(30, warmup=10),
        "validation": VALIDATION,
        "validate_every": 2,
        "patience": 12,
        "min_delta": 1e9,  # the twelfth validation after the first is the last: step 26
    }
    result = bm.fit(
        method, TASKS, steps=steps, tasks_per_step=4, support=5, query=5, seed=3, device=device, progress=False,
        out=folder, resume=resume, log_every=1, checkpoint_every=5, **options,
    )  # fmt: skip
    return result, checkpoint.load(folder / "checkpoint.pt")


PIECES = ("optimizer", "schedule", "generator", "global_generators", "best", "method", "history")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run in one go, one of 16 steps, and what a run has after its first step."""
    place = tmp_path_factory.mktemp("pieces")
    whole = run(place / "whole", 30)
    run(place / "half", 16)
    return whole, place / "half", run(place / "first", 1)[1]


def test_a_resumed_run_stops_early_at_the_same_step(runs, tmp_path):
    (whole, content), half, _ = runs
    result, again = run(shutil.copytree(half, tmp_path / "run"), 30, resume=True)
    assert result.steps == whole.steps == 26
    assert result.history == whole.history
    assert same(again["method"], content["method"])
    assert again["schedule"] == content["schedule"]
    assert again["best"]["waited"] == content["best"]["waited"] == 12


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_of_the_state_that_is_missing_would_be_seen(piece, runs, tmp_path):
    """Control: with that piece as it was after the first step, the resumed run is another."""
    (whole, content), half, first = runs
    folder = shutil.copytree(half, tmp_path / "run")
    kept = checkpoint.load(folder / "checkpoint.pt")
    checkpoint.save(folder / "checkpoint.pt", kept | {piece: first[piece]})
    result, again = run(folder, 30, resume=True)
    alike = (
        result.history == whole.history
        and same(again["method"], content["method"])
        and again["best"]["waited"] == content["best"]["waited"]
    )
    assert not alike


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_generators_of_a_gpu_go_on_where_they_were(tmp_path):
    whole = run(tmp_path / "whole", 20, device="cuda")
    run(tmp_path / "run", 11, device="cuda")
    assert same(run(tmp_path / "run", 20, resume=True, device="cuda")[1]["method"], whole[1]["method"])


# -- loading runs nothing ---------------------------------------------------------------------------------------------


def program(x, y=None, mask=None):
    with bm.task_plate(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 0.5), obs=y)


def make_svi():
    return bm.MetaSVI(program, AutoNormal(program), lambda p: torch.optim.Adam(p, 0.05), pyro.infer.Trace_ELBO())


SUPPORT = TASKS.sample(3, support=4, query=2, generator=0).support

#: Every kind of file of tensors, and what reads it.
READERS = {
    "checkpoint.pt": lambda folder: run(folder, 20, resume=True),
    "checkpoint.previous.pt": lambda folder: bm.fit(Dropout(), TASKS, steps=20, out=folder, resume="previous"),
    "best.pt": lambda folder: bm.load_method(folder, make(), VALIDATION),
    "svi.pt": lambda folder: make_svi().load(folder / "svi.pt", SUPPORT),
    "posterior.pt": lambda folder: bm.load_posterior(folder / "posterior.pt", make().program),
    "lines.pt": lambda folder: Lines.load(folder / "lines.pt"),
    "rates.pt": lambda folder: Rates.load(folder / "rates.pt"),
}


@pytest.mark.parametrize("name", READERS)
def test_code_in_any_file_is_not_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"format": 1, "kind": "DeltaPosterior", "fingerprint": {}, "method": Evil(), "state": {}, "support": {}}
    files.write_tensors(tmp_path / name, content)
    with pytest.raises(errors.CheckpointError, match="cannot be read"):
        READERS[name](tmp_path)
    assert not (tmp_path / "pwned").exists()
    torch.load(tmp_path / name, weights_only=False)
    assert (tmp_path / "pwned").exists(), "control: loaded carelessly, it runs"


def careless(source):
    """Calls that would run code from a file."""
    found: list[str] = []
    if not any(word in source for word in ("load", "pickle", "eval(", "exec(")):
        return found
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append(name)
        if name in ("pickle.load", "pickle.loads", "joblib.load", "dill.load", "eval", "exec"):
            found.append(name)
        if options.get("allow_pickle", "False") != "False":
            found.append(name)
    return found


def test_no_file_is_read_in_a_way_that_could_run_code():
    root = Path(bm.__file__).parent
    calls = {str(path.relative_to(root)): careless(path.read_text()) for path in root.rglob("*.py")}
    assert len(calls) > 100
    assert {path: found for path, found in calls.items() if found} == {}
    control = "torch.load(f)\nnp.load(f, allow_pickle=True)\npickle.load(f)\ntorch.load(f, weights_only=True)"
    assert careless(control) == ["torch.load", "np.load", "pickle.load"]


# -- MetaSVI's files --------------------------------------------------------------------------------------------------


def test_a_damaged_file_of_metasvi_changes_nothing(tmp_path):
    path = tmp_path / "svi.pt"
    svi = make_svi()
    svi.step(SUPPORT)
    svi.save(path)
    other = make_svi()
    for _ in range(2):
        other.step(SUPPORT)
    before = copy.deepcopy(other.state_dict())
    noise = torch.get_rng_state()
    whole = path.read_bytes()
    for damaged in (flip(whole, len(whole) // 2, 3), whole[:-1], b""):
        path.write_bytes(damaged)
        with pytest.raises(errors.CheckpointError, match="cannot be read"):
            other.load(path, SUPPORT)
    assert other.steps == 2
    assert torch.equal(noise, torch.get_rng_state())
    assert difference(before, other.state_dict()) is None
    path.write_bytes(whole)
    other.load(path, SUPPORT)
    assert other.steps == 1  # control
    assert difference(before, other.state_dict()) is not None


def test_metasvi_on_a_full_disk_keeps_the_file_before(tmp_path):
    path = tmp_path / "svi.pt"
    svi = make_svi()
    svi.step(SUPPORT)
    svi.save(path)
    kept = path.read_bytes()
    svi.step(SUPPORT)
    with SmallFiles(500), pytest.raises(errors.RunFolderError, match="could not be written"):
        svi.save(path)
    assert path.read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["svi.pt"]
    svi.save(path)
    assert path.read_bytes() != kept


# -- a disk that is really full ---------------------------------------------------------------------------------------

FULL = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import bayesmeta as bm
from bayesmeta import errors
from tests.test_fit import OPTIONS, make, same, state, train
disk = Path(sys.argv[1])
whole, resumed = make(), make()
train(whole, 40, out=disk / "whole", **OPTIONS)
train(make(), 21, out=disk / "run", **OPTIONS)
kept = (disk / "run" / "checkpoint.pt").read_bytes()
with open(disk / "filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError as error:
        print(error.errno)
try:
    train(make(), 40, out=disk / "run", resume=True, **OPTIONS)
except errors.RunFolderError as error:
    print(error)
assert (disk / "run" / "checkpoint.pt").read_bytes() == kept
assert not list((disk / "run").glob("*.tmp*"))
(disk / "filler").unlink()
train(resumed, 40, out=disk / "run", resume=True, **OPTIONS)
print(same(state(whole), state(resumed)))
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    """A file system of its own, of half a megabyte, where the system lets us mount one."""
    mount = f'mount -t tmpfs -o size=512k tmpfs "{tmp_path}"'
    tried = ["unshare", "-m", "sh", "-c", mount]
    if not shutil.which("unshare") or subprocess.run(tried, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    inside = f'{mount} && exec "{sys.executable}" -c "$1" "{tmp_path}"'
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", inside, "sh", FULL], capture_output=True, text=True, cwd=root, env=environment
    )
    assert result.returncode == 0, result.stderr
    number, message, alike = result.stdout.splitlines()
    assert number == "28"
    assert "could not be written" in message
    assert "No space left on device. Free some space" in message
    assert alike == "True"
    assert list(tmp_path.iterdir()) == []

"""Several ranks train one model: the result of one rank with as many times the tasks, and no hang when one fails.

What two ranks do is done in one go by ``tests/distributed_ranks.py``; the tests read what it found.
"""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.tabular.supports import VariedSupports
from bayesmeta.train import distributed, restart
from bayesmeta.train.distributed import Ranks, join, own_device, world
from tests import distributed_ranks as ranks

ROOT = Path(__file__).parents[1]
FORKS = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes of torch")


def run(folder, *names, module="tests.distributed_ranks"):
    """What each check found on each rank, by name: ``[rank 0's, rank 1's]``."""
    # pools of threads, which numpy and torch start on import, would not be there after a fork
    alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-m", module, str(folder), *names]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **alone}, timeout=240
    )  # fmt: skip
    lines = [[json.loads(text) for text in (folder / f"rank{r}.jsonl").read_text().splitlines()] for r in range(2)]
    for line in [*lines[0], *lines[1]]:
        assert "error" not in line, line["error"]
    assert done.returncode == 0, done.stderr
    return {a["check"]: [a["found"], b["found"]] for a, b in zip(*lines, strict=True)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks"))


# -- the same result ------------------------------------------------------------------------------------------------


@FORKS
@pytest.mark.parametrize("case", ranks.CASES)
def test_two_ranks_are_one_with_twice_the_tasks(case, found):
    first, second = (each[case] for each in found["equal"])
    assert first == second  # bit for bit the same on both
    assert first["theta"] <= (1e-14 if case == "float64" else 1e-6)
    assert first["log"] <= (1e-14 if case == "float64" else 1e-6)  # losses, norms of the gradient, validation
    assert first["moved"] > 1e-2  # control: the run went somewhere
    two, one = first["steps"][::2], first["steps"][1::2]
    assert two == one
    if case == "skip":
        assert two[2] > 0
    if case == "patience":
        assert two[0] < 30


@FORKS
def test_ranks_begin_at_rank_0s_weights(found):
    first, second = found["first_weights"]
    assert first["theta"] <= 1e-6
    assert second["theta"] <= 1e-6
    assert first["digest"] == second["digest"]
    assert first["buffers"] == second["buffers"] == [[True, True], [[0, 2], [1, 3]], [1.0, 1.0, 1.0], []]
    # control: without the broadcast they stay apart
    assert first["digest_without"] != second["digest_without"]
    assert second["without"] > 0.1


@FORKS
def test_why_not_distributed_data_parallel(found):
    """Around the network of an inner loop it leaves each rank with the gradient of its own tasks."""
    first, second = found["ddp_around"]
    assert abs(first - second) > 0.1


# -- tasks, noise, buffers ------------------------------------------------------------------------------------------


@FORKS
def test_each_rank_has_its_own_tasks_and_noise(found):
    first, second = found["shards"]
    for a, b, whole in zip(first["x"], second["x"], first["whole"], strict=True):
        assert a + b == whole
        assert len(a) == len(b) == 3
    assert len({*first["noise"], *second["noise"]}) == 10
    draws = [each["draws"] for each in found["layers"]]
    assert len({*draws[0], *draws[1]}) == 6
    assert all(each["left_alone"] for each in found["layers"])


@FORKS
def test_buffers_are_averaged(found):
    first, second = found["shards"]
    assert first["seen"] == second["seen"] > 0


@FORKS
def test_a_parameter_without_a_gradient_is_left_alone(found):
    untouched, reached = zip(*found["no_gradient"], strict=True)
    assert untouched[0] == untouched[1] == torch.tensor(0.1).item()
    # Adam's first step is of the rate, after a decay of rate 0.1 times 0.5
    assert reached[0] == reached[1]
    assert reached[0] == pytest.approx(0.1 * (1 - 0.05) - 0.1, abs=1e-6)


@pytest.mark.parametrize("count", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_parts_are_disjoint_and_even(count, size):
    parts = [list(range(count))[Ranks(torch.device("cpu"), rank, size).part(count)] for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# -- what goes wrong ------------------------------------------------------------------------------------------------


@FORKS
@pytest.mark.parametrize(
    ("what", "rank", "kind"),
    [
        ("loss", 1, "DataError"),
        ("loss_of_first", 0, "DataError"),
        ("prepare", 1, "DataError"),
        ("folder", 0, "RunFolderError"),
        ("score", 1, "DataError"),
        ("optimizer", 1, "DataError"),
        ("memory", 1, "DeviceMemoryError"),
    ],
)
def test_an_error_on_one_rank_stops_both(what, rank, kind, found):
    mine, others = found["failures"][rank][what], found["failures"][1 - rank][what]
    assert mine[0] == kind
    assert others[0] == "RankError"
    assert others[1] == f"Rank {rank} stopped, and so do all: {kind}: {mine[1]}"


@FORKS
def test_a_loss_that_is_not_finite_names_its_rank(found):
    for kind, text in (each["nan"] for each in found["failures"]):
        assert kind == "NonFiniteLossError"
        assert text.startswith("The loss or its gradient on rank 1 is nan at step 3.")


@FORKS
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("seed", "Rank 1 has seed = 1, and rank 0 has 0"),
        ("steps", "Rank 1 has steps = '3', and rank 0 has '2'"),
        ("tasks_per_step", "Rank 1 has tasks_per_step = 3, and rank 0 has 2"),
        ("model", "the shapes of the parameters"),
        ("rate", "'lr': '0.2'"),
        ("data", "the first batch"),
        ("validation", "the validation tasks"),
        ("few", "2 ranks with tasks_per_step=4 draw 8 tasks a step, and there are 7"),
    ],
)
def test_ranks_must_be_started_alike(what, words, found):
    for each in found["differences"]:
        assert each["same"] is None  # control
        kind, text = each[what]
        assert kind == "OptionError"
        assert words in text


@FORKS
def test_ranks_that_come_apart_are_noticed(found):
    for kind, text in found["come_apart"]:
        assert kind == "RankError"
        assert "The parameters of rank 1 are not those of rank 0 at step 5" in text


# -- folders, stops, going on ---------------------------------------------------------------------------------------


@FORKS
def test_a_signal_to_one_rank_stops_both_at_one_step(found):
    for name, error in (("term", ["SystemExit", "143"]), ("int", ["KeyboardInterrupt", None])):
        for each in found["stops"]:
            assert each[name]["error"][0] == error[0]
            assert each[name]["error"][1] == error[1] or "after step 4; its checkpoint is in" in each[name]["error"][1]
            assert each[name]["step"] == 4
        assert found["stops"][0][name]["files"] == ["checkpoint.pt", "config.json", "log.jsonl"]
        assert found["stops"][0][name]["log"] == [2, 4]  # each line once


@FORKS
def test_a_resumed_run_of_two_ranks_is_bit_identical(found):
    for each in found["resumes"]:
        assert each == {"noisy": [0.0, True, True], "abml": [0.0, True, True]}


@FORKS
def test_another_number_of_ranks_goes_on_with_the_same_tasks_and_says_so(found):
    first, second = found["other_size"]
    assert first["refused"][0] == "CheckpointError"
    assert first["refused"][1].endswith("Go on with tasks_per_step=8.")
    apart, said = first["two_to_one"]
    assert apart <= 1e-6
    assert "had 2 rank(s) until step 4, and goes on with 1" in said[0]
    for each in (first, second):
        assert each["one_to_two"][0] <= 1e-6
    assert "had 1 rank(s) until step 4, and goes on with 2" in first["one_to_two"][1][0]
    assert second["one_to_two"][1] == []


@FORKS
def test_evaluate_gives_the_scores_of_one_process(found):
    first, second = found["evaluate"]
    assert first["two"] == first["one"] == second["two"]
    assert first["two"]["tasks"] > 16
    assert first["scored"] + second["scored"] == first["two"]["tasks"]  # control: each scored some, none all
    assert min(first["scored"], second["scored"]) > 0
    assert first["said"] == 2
    assert second["said"] == 0


@pytest.mark.slow
@FORKS
def test_compiled_ranks(tmp_path):
    found = run(tmp_path, "compiled")["compiled"]
    assert found[0] == found[1] | {"reports": found[0]["reports"]}  # but for the seconds of compiling
    reports = found[0]["reports"]
    assert all(text.startswith("compiled at step 2") and text.endswith("after it") for text in reports)
    assert ["drawn in the graph" in text for text in reports] == [True, False, True]
    assert max(found[0][name] for name in ("theta", "padding", "noise")) <= 1e-5


# -- one process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def torchrun(monkeypatch):
    """torchrun's environment of one process."""
    values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
    for name, value in {**values, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "job"}.items():
        monkeypatch.setenv(name, str(value))


def test_one_rank_of_torchrun_is_a_process_alone(torchrun, tmp_path):
    alone, one = ranks.maml(), ranks.maml()
    ranks.train(alone, distributed="off")
    ranks.train(one, out=tmp_path)
    assert ranks.apart(alone.state_dict(), one.state_dict()) == 0.0
    assert not torch.distributed.is_initialized()
    assert json.loads((tmp_path / "config.json").read_text())["job"] == "job"


def test_a_restart_goes_on_with_its_own_run_whatever_the_script_says(torchrun, tmp_path, monkeypatch):
    whole = ranks.maml()
    ranks.train(whole, steps=12, distributed="off")
    ranks.train(ranks.maml(), steps=8, out=tmp_path / "run")
    with pytest.raises(errors.RunFolderError, match="already holds a run"):
        ranks.train(ranks.maml(), steps=12, out=tmp_path / "run")  # the first start
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for overwrite in (False, True):
        again = ranks.maml()
        result = ranks.train(again, steps=12, out=tmp_path / "run", overwrite=overwrite)
        assert ranks.apart(whole.state_dict(), again.state_dict()) == 0.0
        assert [h["step"] for h in result.history] == list(range(1, 13))
    ranks.train(ranks.maml(), steps=3, out=tmp_path / "new")  # not begun before the restart
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    with pytest.raises(errors.RunFolderError, match="already holds a run"):
        ranks.train(ranks.maml(), steps=12, out=tmp_path / "run")
    result = ranks.train(ranks.maml(), steps=5, out=tmp_path / "run", overwrite=True)
    assert result.history[0]["step"] == 1


def test_jobs_without_a_name_are_told_by_torchruns_process():
    name = restart.job({"TORCHELASTIC_RUN_ID": "none"})
    assert name.endswith(f":{os.getppid()}")
    assert restart.job({"TORCHELASTIC_RUN_ID": "7"}) == "7"
    assert restart.job({}) is None
    assert restart.restarts({"TORCHELASTIC_RESTART_COUNT": "2"}) == 2
    assert restart.restarts({}) == 0
    assert restart.started_again({"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": "1"})
    assert not restart.started_again({"TORCHELASTIC_RESTART_COUNT": "0"})


RANK = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


def test_what_torchrun_says():
    assert world(RANK) == (3, 4, 1, 2)
    assert world({}) is None
    assert world({"RANK": "0", "WORLD_SIZE": "2"}) is None  # of another launcher
    for wrong in ({"RANK": "4"}, {"RANK": "x"}, {"WORLD_SIZE": ""}, {"LOCAL_RANK": "2"}, {"RANK": "-1"}):
        with pytest.raises(errors.OptionError, match="The environment has"):
            world(RANK | wrong)


def test_each_rank_has_a_device_of_its_own():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert own_device(cpu, 1, 2, 0) == cpu
    assert own_device(cuda, 1, 2, 2) == torch.device("cuda:1")
    assert own_device(torch.device("cuda:1"), 0, 1, 2) == torch.device("cuda:1")
    with pytest.raises(errors.OptionError, match=r"device='cuda:0' is one device, and 2 ranks"):
        own_device(torch.device("cuda:0"), 0, 2, 2)
    with pytest.raises(errors.OptionError, match=r"need a CUDA device each, and torch sees 1: .*--nproc-per-node 1"):
        own_device(cuda, 1, 2, 1)


def test_unknown_modes_and_what_is_alone(monkeypatch):
    with pytest.raises(errors.OptionError, match="distributed='on'; expected 'auto' or 'off'"):
        ranks.train(ranks.maml(), distributed="on")
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    alone = join("off", torch.device("cpu"))
    assert (alone.rank, alone.size, alone.is_first) == (0, 1, True)
    assert alone.collect(lambda: 3) == [3]
    assert distributed.count_ranks() == 4
    assert not distributed.is_first()


def test_a_rank_error_comes_back_from_a_worker():
    again = pickle.loads(pickle.dumps(errors.RankError("gone", 2)))
    assert (str(again), again.rank) == ("gone", 2)
    assert isinstance(again, bm.errors.BayesMetaError)


def test_digests_see_one_bit():
    a, b = torch.zeros(5), torch.zeros(5)
    assert distributed.digest([a]) == distributed.digest([b])
    b[2] = -0.0
    assert distributed.digest([a]) != distributed.digest([b])
    assert math.copysign(1.0, b[2].item()) == -1.0


def test_signals_that_ranks_agree_on_are_those_that_stop_a_run():
    assert set(distributed._SIGNALS) == {signal.SIGINT, signal.SIGTERM}


@pytest.mark.parametrize("query", [None, 3])
@pytest.mark.parametrize("order", ["first", "random", "mixed"])
def test_a_rank_looks_up_no_rows_of_other_ranks(order, query):
    table = bm.tasks.TableTasks.from_dataframe(ranks.frame(), task="task", x=["x"], y="y", order=order)
    for tasks in (table, VariedSupports(table)):
        generators = [torch.Generator().manual_seed(5) for _ in range(3)]
        whole = tasks.sample(11, support=4, query=query, generator=generators[0])
        for rank in range(2):
            place = Ranks(torch.device("cpu"), rank, 2).part
            part = tasks.sample_part(place, 11, support=4, query=query, generator=generators[1 + rank])
            expected = whole.tasks(place(11))
            for name in ("support", "query"):
                a, b = vars(getattr(part, name)), vars(getattr(expected, name))
                assert all((a[k] is None) == (b[k] is None) and (a[k] is None or a[k].equal(b[k])) for k in a)
            assert (part.names, part.task_id.tolist()) == (expected.names, expected.task_id.tolist())
            assert part.population == expected.population
            assert generators[1 + rank].get_state().equal(generators[0].get_state())


@pytest.mark.parametrize("rotations", [False, True])
def test_a_rank_looks_up_no_images_of_other_ranks(rotations):
    numbers = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (30, 1, 4, 4), generator=numbers, dtype=torch.uint8)
    labels = torch.arange(30) // 5
    tasks = bm.tasks.ImageClasses.from_labels(pixels, labels, ways=3, rotations=rotations)
    generators = [torch.Generator().manual_seed(5) for _ in range(3)]
    whole = tasks.sample(5, support=3, query=6, generator=generators[0])
    for rank in range(2):
        place = Ranks(torch.device("cpu"), rank, 2).part
        part = tasks.sample_part(place, 5, support=3, query=6, generator=generators[1 + rank])
        expected = whole.tasks(place(5))
        for name in ("support", "query"):
            a, b = getattr(part, name), getattr(expected, name)
            assert a.x.equal(b.x)
            assert a.y.equal(b.y)
        assert generators[1 + rank].get_state().equal(generators[0].get_state())

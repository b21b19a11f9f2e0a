"""Compiled code is kept: a second process compiles the same step in a fraction of the time, to the same bits."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.test_compile import run

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
import bayesmeta as bm
from bayesmeta.train.compilation.compiling import Compiler
made = []
build = Compiler._build
def noted(self, key, step):
    build(self, key, step)
    made.append(step)
Compiler._build = noted
torch.manual_seed(0)
method = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [8], 1), bm.Gaussian(0.5)))
options = {"tasks_per_step": 4, "progress": False, "device": "cpu", "log_every": 1, "compile": "inductor"}
result = bm.fit(method, bm.tasks.Sinusoid(noise=0.1), steps=6, seed=int(sys.argv[1]), **options)
from torch._dynamo.utils import counters
caches = {k: v for k, v in counters["inductor"].items() if "cache" in k}
losses = [entry["loss"] for entry in result.history]
print(json.dumps({"seconds": made[0].seconds["compile"], "caches": caches, "losses": losses, "text": result.compiled}))
"""


def in_a_process(folder, seed=0):
    """What the script says, with the compiler's cache in a folder."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(seed)], env=env, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    first, second, other = in_a_process(tmp_path), in_a_process(tmp_path), in_a_process(tmp_path, seed=1)
    assert first["caches"] == {"fxgraph_cache_miss": 1}
    assert second["caches"] == {"fxgraph_cache_hit": 1}
    assert second["seconds"] < 0.6 * first["seconds"]
    assert second["losses"] == first["losses"]
    assert first["text"].startswith("compiled at step 2")
    assert other["caches"] == {"fxgraph_cache_hit": 1}  # the seed is no part of the code
    assert other["losses"] != first["losses"]


@pytest.mark.slow
def test_a_resumed_run_of_compiled_code_is_bit_identical(tmp_path):
    _, ours = run(compile="inductor")
    run(compile="inductor", steps=5, out=tmp_path / "run")
    found, resumed = run(compile="inductor", out=tmp_path / "run", resume=True)
    assert found.compiled.startswith("compiled at step")
    assert torch.equal(ours, resumed)
    _, other = run(compile="inductor", seed=1)
    assert not torch.equal(ours, other)

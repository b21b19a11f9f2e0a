"""Import is lazy, has no side effects, and the arrows between rooms point one way."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import bayesmeta as bm

ROOT = Path(__file__).parents[1]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_lazy():
    heavy = ("torch", "pyro", "arviz_base", "pandas", "matplotlib", "statsmodels", "xarray", "gymnasium")
    out = python(f"import sys, bayesmeta; print([m for m in {heavy!r} if m in sys.modules])")
    assert out.strip() == "[]"


def test_help_answers_without_torch_in_half_a_second():
    command = [str(Path(sys.executable).with_name("bayesmeta")), "--help"]
    subprocess.run(command, capture_output=True, check=True)  # once, so that the files are cached
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begin)
    assert "demo" in result.stdout
    assert min(seconds) < 0.5
    assert "torch" not in python("import sys, bayesmeta.cli; print([m for m in sys.modules if m == 'torch'])")


def test_import_leaves_global_state_alone():
    out = python(
        "import torch, pyro, warnings\n"
        "def state():\n"
        "    return (torch.get_default_dtype(), torch.get_rng_state().sum().item(), torch.is_grad_enabled(),\n"
        "            len(pyro.get_param_store()), pyro.distributions.torch_distribution.Distribution.has_rsample,\n"
        "            torch.distributions.Distribution._validate_args, pyro.settings.get(), len(warnings.filters),\n"
        "            torch.get_num_threads())\n"
        "before = state()\n"
        "import bayesmeta as bm\n"
        "for name in bm.__all__: getattr(bm, name)\n"
        "print(before == state())"
    )
    assert out.strip() == "True"


def test_every_name_is_there():
    for name in bm.__all__:
        assert getattr(bm, name) is not None
    assert set(bm.__all__) <= set(dir(bm))
    with pytest.raises(AttributeError, match="no attribute 'Mamal'"):
        bm.Mamal  # noqa: B018


def test_arrows_between_rooms():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_wheel_builds_and_imports_in_a_clean_environment(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)], cwd=ROOT, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    clean = tmp_path / "venv" / "bin" / "python"
    subprocess.run([clean, "-m", "pip", "install", "-qq", "--no-deps", str(wheel)], check=True)
    subprocess.run([clean, "-m", "pip", "install", "-qq", "tyro"], check=True)
    code = "import bayesmeta, importlib.metadata as m; print(bayesmeta.__version__ == m.version('bayesmeta'))"
    assert subprocess.run([clean, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "True"
    help_text = subprocess.run([clean.with_name("bayesmeta"), "--help"], capture_output=True, text=True, check=True)
    assert "demo" in help_text.stdout
    listing = subprocess.run([sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True).stdout
    assert "bayesmeta/py.typed" in listing

"""The modules of bayesmeta.rl are there after ``import bayesmeta``, as the pages of the documentation name them."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bayesmeta as bm
from bayesmeta.ops.rooms import module_of, modules_of

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"\b(?:bm|bayesmeta)\.(rl(?:\.[a-z_0-9]+)+)")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def packages(name="bayesmeta.rl"):
    """All packages of bayesmeta.rl, itself too."""
    found = [name]
    for each in pkgutil.iter_modules(importlib.import_module(name).__path__, f"{name}."):
        found += packages(each.name) if each.ispkg else []
    return found


def test_what_the_pages_name_is_an_attribute_of_a_fresh_import():
    named = sorted({name for page in (ROOT / "docs").glob("*.md") for name in NAMED.findall(page.read_text())})
    named = [name for name in named if not name.endswith((".py", ".md"))]
    assert len(named) > 10
    assert "rl.latent.contexts" in " ".join(named)
    code = f"import bayesmeta as bm, operator\nfor name in {named!r}: operator.attrgetter(name)(bm)\nprint('all there')"
    assert python(code) == "all there"


def test_all_packages_give_their_modules():
    assert {"bayesmeta.rl.latent", "bayesmeta.rl.varibad", "bayesmeta.rl.envs"} <= set(packages())
    code = "import bayesmeta as bm, operator\n" + "\n".join(
        f"for name in {modules_of(package)!r}: print(operator.attrgetter({package[10:] + '.'!r} + name)(bm).__name__)"
        for package in packages()
    )
    expected = [f"{package}.{name}" for package in packages() for name in modules_of(package)]
    assert python(code).split("\n") == expected
    assert "bayesmeta.rl.latent.checks" in expected


def test_a_module_is_imported_when_it_is_asked_for_and_not_before():
    code = (
        "import sys, bayesmeta as bm\n"
        "bm.rl\n"
        "there = lambda: 'bayesmeta.rl.latent.checks' in sys.modules\n"
        "print(there(), bm.rl.latent.__name__, there(), bm.rl.latent.checks.compare_arms.__name__, there())"
    )
    assert python(code) == "False bayesmeta.rl.latent False compare_arms True"


@pytest.mark.parametrize("name", ["chekcs", "_places", "__wrapped__"])
def test_what_is_not_there_is_an_attribute_error(name):
    for package in (bm.rl, bm.rl.latent):
        assert not hasattr(package, name)
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute '{name}'"):
            getattr(package, name)


def test_modules_stand_beside_the_public_names_in_dir():
    assert {"checks", "contexts", "pictures"} <= set(dir(bm.rl.latent))
    assert {"latent", "varibad", "VariBAD", "__name__"} <= set(dir(bm.rl))
    assert "latent" not in bm.rl.__all__  # names of the reference are those of objects


def test_private_modules_stay_private(tmp_path, monkeypatch):
    (tmp_path / "some_rooms").mkdir()
    for file in ("__init__", "_hidden", "open"):
        (tmp_path / "some_rooms" / f"{file}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert modules_of("some_rooms") == ("open",)
    assert module_of("some_rooms", "open").__name__ == "some_rooms.open"
    with pytest.raises(AttributeError, match="no attribute '_hidden'"):
        module_of("some_rooms", "_hidden")

"""What the documentation shows must run, and must speak of every public name.

Every ``python`` block of README.md and docs/*.md is run, in order and in one namespace for each file, with long loops
cut short (:func:`shorten`). A block is left out only if the line before it is ``<!-- not run: REASON -->``.
"""

import importlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import bayesmeta as bm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?P<marker><!-- not run:(?P<reason>.*)-->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
#: ``steps=2_000`` (not ``inner_steps=5``), ``range(1_000)`` and ``iterations=260``; numbers below the least stay.
LONG = re.compile(r"(?P<head>\b(?:steps=|range\(|iterations=))(?P<number>\d[\d_]*)")
LEAST = {"iterations=": 100}
SHORT, SHORT_ITERATIONS = 12, 2


def shorten(code):
    """The same code with training of 1000 steps or more cut to a few; a longer run stays longer than a shorter one."""

    def cut(match):
        number = int(match["number"].replace("_", ""))
        if number < LEAST.get(match["head"], 1000):
            return match["head"] + str(number)
        return match["head"] + str(SHORT_ITERATIONS if match["head"] in LEAST else SHORT + number // 1000)

    return LONG.sub(cut, code)


def blocks(page):
    """Line number and code of each block that is run."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        assert match["marker"] is None or match["reason"].strip(), f"{page.name}: a block is left out without a reason"
        if match["marker"] is None:
            yield text.count("\n", 0, match.start("code")) + 1, match["code"]


def run_page(page):
    namespace = {"__name__": "__docs__"}
    for line, code in blocks(page):
        source = "\n" * (line - 1) + shorten(code)  # so that a traceback names the page's own line
        exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pictures and run folders go there
    with warnings.catch_warnings():
        # the page on leave-one-out says that this warning comes, and that it should be believed
        warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto")
        run_page(page)


def test_a_block_that_fails_is_found(tmp_path):
    """Control: the runner sees blocks, runs them in one namespace, and lets their errors through."""
    page = tmp_path / "page.md"
    page.write_text("```python\na = 1\n```\ntext\n```python\nassert a == 2\n```\n")
    with pytest.raises(AssertionError):
        run_page(page)
    page.write_text("<!-- not run: needs a GPU -->\n```python\nraise ValueError\n```\n")
    run_page(page)
    page.write_text("<!-- not run: -->\n```python\na = 1\n```\n")
    with pytest.raises(AssertionError, match="without a reason"):
        run_page(page)


def test_every_python_block_is_recognised():
    for page in PAGES:
        text = page.read_text()
        assert len(BLOCK.findall(text)) == text.count("```python"), page.name
    assert sum(len(list(blocks(page))) for page in PAGES) > 30


def test_only_long_runs_are_shortened():
    code = "fit(m, steps=2_000, inner_steps=5000)\nfor _ in range(1_000):\n"
    code += "    f(steps=40, n=3000, x=range(10), iterations=99)\ng(iterations=260, old_iterations=300)"
    expected = (
        "fit(m, steps=14, inner_steps=5000)\nfor _ in range(13):\n    f(steps=40, n=3000, x=range(10), iterations=99)"
    )
    expected += "\ng(iterations=2, old_iterations=300)"
    assert shorten(code) == expected


# -- examples -----------------------------------------------------------------------------------------------------


def run_example(name, *arguments, folder):
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / name), "--quick", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("method", ["maml", "abml", "last-layer"])
def test_the_sinusoid_example_runs(method, tmp_path):
    out = ["--out", "forecast.png"] if method == "last-layer" else []
    assert f"{method} on 50 new tasks" in run_example("sinusoid.py", "--method", method, *out, folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == out[1:]


def test_the_example_of_ones_own_model_runs(tmp_path):
    printed = run_example("own_prior_and_guide.py", folder=tmp_path)
    assert all(name in printed for name in ("MetaSVI", "ABML", "MAML", "coverage_90", "mu[0]"))


def test_the_example_of_beliefs_over_tasks_runs(tmp_path):
    printed = run_example("beliefs_over_tasks.py", folder=tmp_path)
    assert all(words in printed for words in ("return by episode", "eti89_lb", "belief and NUTS differ", "AUROC"))


def test_examples_stay_short():
    for path in (ROOT / "examples").glob("*.py"):
        lines = path.read_text().count("\n")
        assert lines < 80, f"{path.name} has {lines} lines; an example is read in one sitting"


# -- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in bm.__all__ if name != "__version__"])
def test_a_public_name_imports_and_has_a_docstring(name):
    value = getattr(bm, name)
    assert value.__doc__ is not None
    assert value.__doc__.strip()
    if isinstance(value, type):
        assert "__doc__" in vars(value), f"{name} has only the docstring that it inherits"


def test_every_public_name_is_documented():
    text = "\n".join(page.read_text() for page in PAGES)
    missing = [name for name in bm.__all__ if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
    assert not missing


def test_the_reference_has_every_public_name_and_no_other():
    """The targets of docs/api.md exist, and every public object is one of them."""
    targets = re.findall(r"^::: (bayesmeta\.[\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    documented = []
    for target in targets:
        module, _, name = target.rpartition(".")
        documented.append(getattr(importlib.import_module(module), name))
    modules = {"diagnostics", "encoders", "likelihoods", "metrics", "nets", "priors", "processes", "rl", "schedules"}
    modules |= {"tasks"}
    for name in set(bm.__all__) - modules - {"__version__"}:
        assert any(getattr(bm, name) is value for value in documented), name
    for room in (bm.tasks, bm.rl):
        for name in room.__all__:
            assert any(getattr(room, name) is value for value in documented), name


def test_links_between_pages_exist():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"

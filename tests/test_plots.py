"""The forecast picture: what is drawn is what the posterior says, and nothing global changes."""

import math
import subprocess
import sys
from dataclasses import replace

import matplotlib
import matplotlib.figure
import pyro.distributions as dist
import pytest
import torch

import bayesmeta as bm
from bayesmeta.data import Observations, Standardizer, TaskBatch
from bayesmeta.diagnostics.plots import GRID_POINTS, plot_forecast
from bayesmeta.errors import EmptyTaskError, NoClosedFormError, NonFiniteDataError, OptionError, ShapeError
from bayesmeta.tasks.sinusoid import Sinusoid


class Line:
    """Predicts N(2 x₀, 0.5²), as a distribution or in draws."""

    is_point = False
    target_kind = "real"

    def __init__(self, support, *, closed=True, outputs=1, bad_task=None):
        self.support, self.num_tasks = support, support.num_tasks
        self.closed, self.outputs, self.bad_task = closed, outputs, bad_task

    def predictive(self, x, *, joint=False):
        if not self.closed:
            raise NoClosedFormError("hidden")
        loc = 2.0 * x.x[..., 0]
        if self.bad_task is not None:
            loc[self.bad_task] = math.inf
        if self.outputs > 1:
            loc = torch.stack([loc + 10.0 * i for i in range(self.outputs)], -1)
            return dist.Normal(loc, 0.5).to_event(1)
        return dist.Normal(loc, 0.5, validate_args=False)

    def draws(self, num_samples, generator=None):
        return num_samples

    def predict(self, x, num_samples=1000, *, draws=None, generator=None):
        noise = torch.randn(draws, *x.x.shape[:2], generator=generator)
        return 2.0 * x.x[..., 0] + 0.5 * noise


@pytest.fixture
def batch():
    return Sinusoid(0.1).sample(5, support=4, query=7, generator=1)


def visible(figure):
    return [a for a in figure.axes if a.get_visible()]


@pytest.mark.parametrize("closed", [True, False])
def test_what_is_drawn(batch, closed):
    figure = plot_forecast(Line(batch.support, closed=closed), batch, num_samples=4000)
    assert len(visible(figure)) == 5
    axis = figure.axes[1]
    (mean,) = axis.lines
    x, y = mean.get_data()
    everything = torch.cat([batch.support.x[1], batch.query.x[1]])
    assert len(x) == GRID_POINTS
    assert x[0] == pytest.approx(everything.min().item())
    assert x[-1] == pytest.approx(everything.max().item())
    assert y == pytest.approx(2 * x, abs=1e-5 if closed else 0.05)
    half, most = (c.get_paths()[0].get_extents() for c in axis.collections if c.get_paths()[0].vertices.shape[0] > 100)
    reach = 2 * (x[-1] - x[0])
    assert half.height == pytest.approx(reach + 2 * 0.6744898 * 0.5, abs=0.15)
    assert most.height == pytest.approx(reach + 2 * 1.6448536 * 0.5, abs=0.25)
    dots = {len(c.get_offsets()) for c in axis.collections}
    assert {4, 7} <= dots


def test_one_legend_titles_and_labels(batch):
    batch = replace(batch, names=("ada", "bob", "cem", "dee", "eve"))
    figure = plot_forecast(Line(batch.support), batch, x_label="age", y_label="height", tasks=[4, 1], columns=1)
    assert [a.get_title() for a in figure.axes] == ["eve", "bob"]
    (legend,) = figure.legends
    labels = [t.get_text() for t in legend.get_texts()]
    assert labels == ["support", "query", "predictive mean", "50% interval", "90% interval"]
    assert all(a.get_legend() is None for a in figure.axes)
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("age", "height")


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_legend_fits_the_figure(batch, columns):
    figure = plot_forecast(Line(batch.support), batch, columns=columns)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_panels_are_limited_and_padding_is_left_out(batch):
    assert len(visible(plot_forecast(Line(batch.support), batch, max_panels=3))) == 3
    padded = replace(batch, task_id=torch.tensor([7, -1, 8, -1, 9]))
    figure = plot_forecast(Line(batch.support), padded)
    assert [a.get_title() for a in visible(figure)] == ["task 7", "task 8", "task 9"]


def test_masked_points_are_not_drawn(batch):
    mask = torch.tensor([[True] * 5 + [False] * 2] * 5)
    garbage = torch.where(mask.unsqueeze(-1), batch.query.x, 99.0)
    other = replace(batch, query=Observations(garbage, batch.query.y, mask))
    axis = plot_forecast(Line(batch.support), other).axes[0]
    assert max(axis.lines[0].get_xdata()) < 6
    assert {len(c.get_offsets()) for c in axis.collections} >= {4, 5}


def test_raw_units(batch):
    scaling = Standardizer(torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor(10.0), torch.tensor(5.0))
    batch = replace(batch, standardizer=scaling)
    raw, standard = (
        plot_forecast(Line(batch.support), batch, raw_units=r).axes[0].lines[0].get_data() for r in (True, False)
    )
    assert raw[0] == pytest.approx(standard[0] * 3 + 1, abs=1e-4)
    assert raw[1] == pytest.approx(standard[1] * 5 + 10, abs=1e-4)


def test_several_features_and_outputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 3, generator=generator)
    y = torch.randn(2, 6, 2, generator=generator)
    batch = TaskBatch(Observations(x[:, :2], y[:, :2]), Observations(x[:, 2:], y[:, 2:]))
    axis = plot_forecast(Line(batch.support, outputs=2), batch, feature=0, output=1).axes[0]
    along, mean = axis.lines[0].get_data()
    assert along == pytest.approx(x[0, :, 0].sort().values.numpy())
    assert mean == pytest.approx(2 * along + 10, abs=1e-5)
    axis = plot_forecast(Line(batch.support, outputs=2), batch, feature=2).axes[1]
    order = x[1, :, 2].argsort()
    assert axis.lines[0].get_ydata() == pytest.approx(2 * x[1, order, 0].numpy(), abs=1e-5)


def test_query_without_targets_and_task_without_support(batch):
    support = replace(batch.support, mask=torch.tensor([[False] * 4] + [[True] * 4] * 4))
    other = replace(batch, support=support, query=batch.query.with_y(None))
    figure = plot_forecast(Line(support), other)
    assert len(visible(figure)) == 5
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert "query" not in labels
    assert "support" in labels


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_files(batch, tmp_path, suffix):
    path = tmp_path / "new" / f"forecast.{suffix}"
    plot_forecast(Line(batch.support), batch, path=path, tasks=[0])
    assert path.stat().st_size > 1000
    assert len(list(path.parent.iterdir())) == 1


def test_nothing_global_changes(batch, tmp_path):
    before = dict(matplotlib.rcParams)
    plot_forecast(Line(batch.support), batch, path=tmp_path / "a.png", tasks=[0])
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys, bayesmeta.diagnostics.plots, bayesmeta.diagnostics.datatree, bayesmeta.diagnostics.scores;"
        "sys.exit(any(m in sys.modules for m in ('matplotlib', 'xarray', 'arviz_base', 'arviz_stats')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_errors_are_typed(batch, tmp_path):
    posterior = Line(batch.support)
    with pytest.raises(OptionError, match="tasks=5"):
        plot_forecast(posterior, batch, tasks=[5])
    with pytest.raises(OptionError, match="feature=1"):
        plot_forecast(posterior, batch, feature=1)
    with pytest.raises(OptionError, match="output=1"):
        plot_forecast(posterior, batch, output=1)
    with pytest.raises(OptionError, match="columns=0"):
        plot_forecast(posterior, batch, columns=0)
    with pytest.raises(OptionError, match="max_panels=0"):
        plot_forecast(posterior, batch, max_panels=0)
    with pytest.raises(OptionError, match="suffix"):
        plot_forecast(posterior, batch, tasks=[0], path=tmp_path / "forecast.xyz")
    with pytest.raises(EmptyTaskError):
        plot_forecast(posterior, batch, tasks=[])
    with pytest.raises(ShapeError, match="2 tasks"):
        plot_forecast(posterior, batch.tasks([0, 1]))
    named = replace(batch, names=("ada", "bob", "cem", "dee", "eve"))
    with pytest.raises(NonFiniteDataError, match="cem"):
        plot_forecast(Line(batch.support, bad_task=2), named)


def test_several_inputs_are_not_joined_by_a_line():
    """Points that differ in another input too are no curve: each has its own mean and intervals."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 2, generator=generator)
    batch = bm.TaskBatch(bm.Observations(x[:, :6], x[:, :6].sum(-1)), bm.Observations(x[:, 6:], x[:, 6:].sum(-1)))
    for width, style in ((2, "None"), (1, "-")):
        narrow = bm.TaskBatch(
            bm.Observations(batch.support.x[..., :width], batch.support.y),
            bm.Observations(batch.query.x[..., :width], batch.query.y),
        )
        method = bm.MultiTask(bm.NeuralTaskModel(bm.nets.mlp(width, [4], 1), bm.Gaussian(0.5), "point"))
        figure = bm.plot_forecast(method.adapt(narrow.support), narrow)
        assert figure.axes[0].lines[0].get_linestyle() == style


def test_names_are_drawn_as_they_are_written(batch, tmp_path):
    """A formula that cannot be parsed stops the drawing; one that is no formula is a name like any other."""
    evil, hidden = r"$\frac$", "_cost_$a$"
    figure = matplotlib.figure.Figure()
    figure.suptitle(evil)
    with pytest.raises(ValueError, match="frac"):  # control
        figure.draw_without_rendering()
    posterior, names = Line(batch.support), (evil, hidden, "c", "d", "e")
    named = replace(batch, names=names)
    figure = plot_forecast(posterior, named, x_label=evil, y_label=hidden, path=tmp_path / "a.png")
    assert [a.get_title() for a in visible(figure)] == list(names)
    found = bm.calibration(posterior, batch)
    figure = bm.plot_calibration({evil: found, hidden: found}, path=tmp_path / "b.png")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [evil, hidden]
    each = torch.arange(5.0)
    scores = bm.Scores({"nll": 2.0}, {"nll": 0.7}, {"nll": each}, 5, 0, True)
    figure = bm.plot_compare(bm.compare({evil: scores, hidden: scores}), path=tmp_path / "c.png")
    assert {text.get_text() for text in figure.axes[0].get_yticklabels()} == {evil, hidden}
    generator = torch.Generator().manual_seed(0)
    ranks = bm.sbc(
        lambda generator: ({evil: torch.zeros(())}, torch.zeros(1)),
        lambda y: {evil: torch.randn(15, generator=generator)},
        num_simulations=40,
        num_draws=15,
    )
    assert bm.plot_ranks(ranks, path=tmp_path / "d.png").axes[0].get_title().startswith(evil)

"""The report: a page that parses, reaches for nothing, says what the library's own figures say, and hides nothing."""

import base64
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from forecast_cases import Labels, Linear, label_tasks, linear_tasks

import bayesmeta as bm
from bayesmeta.diagnostics import plots
from bayesmeta.errors import OptionError, RunFolderError
from bayesmeta.report import alarms, findings
from bayesmeta.report.folder import kind_of
from bayesmeta.tabular.fit import fit_csv
from bayesmeta.tabular.report import report_csv

VOID = {"meta", "link", "img", "br", "hr", "input"}
QUIET = {"say": lambda text: None}


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.words, self.headings = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], "tags were left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def row(self, name):
        (found,) = [row[1:] for row in self.rows if row and row[0] == name]
        return found


def read(path):
    text = path.read_text(encoding="utf-8")
    return Page(text), text


EVIL = "<script>alert(1)</script> & $x"


class WithTheta(Linear):
    """Its θ has a posterior, N(3, 0.5²)."""

    def named_theta(self, draws):
        generator = torch.Generator().manual_seed(1)
        return {"mu": 3 + 0.5 * torch.randn(len(draws.u), 1, generator=generator), "point": torch.ones(len(draws.u))}


def case(tasks=40, factor=1.0, kind=Linear):
    family, batch = linear_tasks(tasks, seed=4)
    names = [f"task {i}" for i in range(tasks)]
    batch = replace(batch, names=(EVIL, *names[1:]))
    return kind(family, batch.support, factor), batch


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of an over-confident posterior, and what it was made of."""
    posterior, batch = case(factor=0.5, kind=WithTheta)
    exact, _ = case()
    path = tmp_path_factory.mktemp("page") / "r.html"
    log = [{"step": 10 * i, "loss": 5.0 - i, "validation": 4.0 - i} for i in range(3)]
    found = bm.write_report(
        path,
        posterior,
        batch,
        name="narrow",
        facts={"data": "lines <b>"},
        baselines={"exact": bm.scores(exact, batch), "told": {"nll": 99.0}},
        log=log,
        best_step=20,
    )
    assert found == path
    return path, posterior, batch, exact


def test_the_page_parses_and_reaches_for_nothing(written):
    page, text = read(written[0])
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        for name in ("src", "href"):
            if name in attrs:
                assert attrs[name].startswith(("data:", "#")), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs)
    assert not re.search(r"https?://|@import|url\(", text)
    assert len(text.encode()) < 3_000_000


def test_the_parser_of_these_tests_finds_faults():
    for bad in ("<p><b>x</p></b>", "<div>"):
        with pytest.raises(AssertionError):
            Page(bad)


def test_it_can_be_read_without_seeing_it(written):
    page, _ = read(written[0])
    assert page.all("html") == [{"lang": "en"}]
    assert "width=device-width" in {a.get("name"): a for a in page.all("meta")}["viewport"]["content"]
    assert len(page.all("main")) == len(page.all("header")) == len(page.all("footer")) == len(page.all("h1")) == 1
    assert page.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:]))
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    links = [a["href"] for a in page.all("a")]
    assert links[0] == "#main"
    focusable = [(t, a) for t, a in page.tags if t in ("a", "summary", "button", "input") or "tabindex" in a]
    assert focusable[0] == ("a", {"class": "skip", "href": "#main"}), "the first that the Tab key reaches"
    assert {a.get("tabindex", "0") for _, a in focusable} <= {"0", "-1"}, "the order is that of the page"
    assert all(a.get("aria-label") for _, a in focusable if a.get("role") == "region")
    (nav,) = page.all("nav")
    assert nav["aria-label"]
    assert {a["aria-labelledby"] for a in page.all("section")} <= ids
    assert len(page.all("table")) == len(page.all("caption"))
    assert len(page.all("img")) == len(page.all("figure")) == len(page.all("figcaption"))
    assert {link[1:] for link in links} <= ids
    images = page.all("img")
    assert len(images) == 1 + 2 + 1 + 6 + 2 + 1  # curve, calibration, signs, forecasts, φ, θ
    assert all(len(image["alt"]) > 40 for image in images)
    assert len({image["alt"] for image in images}) == len(images)
    assert all(base64.b64decode(image["src"].split(",")[1]).startswith(b"\x89PNG") for image in images)
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    high, low = sorted([luminance(a), luminance(b)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def schemes(style):
    """The colours by day and by night."""
    parts = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(parts) == 2
    assert "prefers-color-scheme: dark" in style.split(parts[1])[0]
    return parts


def test_contrast_is_that_of_wcag_aa(written):
    _, text = read(written[0])
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in schemes(style))
    assert set(light) == set(dark)
    assert light["ground"] != dark["ground"]
    # every other colour is white, that of the pictures, or one of these by name
    assert set(re.findall(r"#[0-9a-fA-F]{3,6}\b", style)) == {"#ffffff", *light.values(), *dark.values()}
    for scheme in (light, dark):
        grounds = [scheme[name] for name in ("ground", "note", "warning", "good")]
        for name in ("ink", "soft", "link"):
            for ground in grounds:
                assert contrast(scheme[name], ground) >= 4.5, (name, ground)
        for name in ("note", "warning", "good"):  # edges are no text: 3
            assert contrast(scheme[f"{name}-edge"], scheme[name]) >= 3
    for colour in (plots.INK, plots.BLUE):
        assert contrast(colour, "#ffffff") >= 4.5
    for colour in (plots.ORANGE, plots.GREY):  # lines and dots
        assert contrast(colour, "#ffffff") >= 3
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01), "control: just not enough"


def test_names_from_outside_are_escaped(written):
    page, text = read(written[0])
    assert "<script" not in text
    assert "<b>" not in text
    assert "lines <b>" in page.row("data")[0]
    assert any(EVIL in words for words in [*page.words, *(image["alt"] for image in page.all("img"))])


def test_its_numbers_are_those_of_scores(written):
    path, posterior, batch, exact = written
    page, _ = read(path)
    columns = next(row for row in page.rows if "CRPS" in row)[1:]
    keys = {"NLL a point": "nll", "CRPS": "crps", "RMSE": "rmse", "50% covers": "coverage_50"}
    keys |= {"90% covers": "coverage_90", "90% width": "width_90"}
    assert columns == list(keys)
    for who, model in (("narrow", posterior), ("exact", exact)):
        expected = bm.scores(model, batch)
        for column, cell in zip(columns, page.row(who)):
            for number, value in zip(
                cell.split(" ± "), (expected[keys[column]], expected.standard_errors[keys[column]])
            ):
                scale = 100 if number.endswith("%") else 1
                places = len(number.rstrip("%").partition(".")[2])
                tolerance = 0.51 * 10.0**-places if "e" not in number else 1e-15
                assert float(number.rstrip("%")) == pytest.approx(scale * value, abs=tolerance), (who, column)
    assert page.row("told") == ["99", *["—"] * 5]


def test_over_confidence_is_said_in_words(written, tmp_path):
    page, _ = read(written[0])
    words = " ".join("".join(page.words).split())
    verdict = bm.calibration(written[1], written[2])
    assert verdict.finding == "over-confident"
    assert f"Warning. {verdict.verdict}" in words
    assert "Try bm.recalibrate" in words
    assert "The baseline “exact” has the lower NLL" in words
    assert "“told” has the lower" not in words
    posterior, batch = case()
    page, _ = read(bm.write_report(tmp_path / "r.html", posterior, batch))
    words = " ".join("".join(page.words).split())
    assert "Good. 90% intervals cover" in words
    assert "Warning." not in words
    assert "No baselines were given" in words
    assert "learned as a point" in words
    assert "No losses were kept" in words


def test_theta_is_shown_where_it_has_a_posterior(written):
    page, _ = read(written[0])
    mean, sd, *_ = map(float, page.row("mu[0]"))
    draws = written[1].named_theta(written[1].draws(500))["mu"]
    assert mean == pytest.approx(float(draws.mean()), rel=1e-3)
    assert sd == pytest.approx(float(draws.std()), rel=0.05)
    assert not any(row and row[0] == "point" for row in page.rows)


def test_the_worst_the_surprising_and_the_best():
    posterior, batch = case()
    batch.query.y[7] += 30.0  # far out
    result, verdict = bm.scores(posterior, batch), bm.calibration(posterior, batch)
    chosen = findings.choose(result, verdict, 2)
    order = result.per_task["nll"].argsort()
    assert chosen.worst == order.flip(0)[:2].tolist()
    assert chosen.worst[0] == 7
    assert chosen.best == [i for i in order.tolist() if i not in chosen.surprising][:2]
    tail = (-(1 - (2 * verdict.pit - 1).abs()).clamp(min=1e-300).log()).mean(-1)
    assert chosen.surprising == [i for i in tail.argsort(descending=True).tolist() if i not in chosen.worst][:2]
    assert len(set(chosen.all())) == 6
    # of calibrated forecasts −log of a uniform tail is 1 on the whole, of over-confident ones more
    rest = torch.arange(40) != 7
    error = float(chosen.surprise[rest].std()) / 39**0.5
    assert abs(float(chosen.surprise[rest].mean()) - 1) < 4 * error
    narrow = case(factor=0.5)[0]
    assert float(findings._surprise(bm.calibration(narrow, batch))[rest].mean()) > 1 + 4 * error


def test_phi_is_that_of_the_posterior():
    posterior, _ = case()
    found, remark = findings.task_parameters(posterior, [3, 5, 8, 11], 1, 0)
    assert remark == ""
    (only,) = found
    place = int(only.name[4])
    mean = posterior.mean[[3, 5, 8, 11], place]
    error = 4 * posterior.covariance[[3, 5, 8, 11], place, place].sqrt() / 500**0.5
    assert (torch.tensor(only.draws.mean(0)) - mean).abs().lt(error).all()
    prior = posterior.tasks
    assert abs(only.prior.mean() - float(prior.mean[place])) < 4 * float(prior.covariance[place, place] / 2000) ** 0.5


def test_few_tasks_and_classes(tmp_path):
    posterior, batch = case(tasks=3)
    page, _ = read(bm.write_report(tmp_path / "few.html", posterior, batch))
    words = " ".join("".join(page.words).split())
    assert "Only 3 task(s) were scored" in words
    assert "too few tasks to show others" in words
    batch, logits = label_tasks(30)
    labels = Labels(batch.support, logits, 3.0)
    labels.named = lambda draws: {}
    labels.named_theta = lambda draws: {}
    labels.prior_draws = labels.draws
    page, _ = read(bm.write_report(tmp_path / "labels.html", labels, batch))
    words = " ".join("".join(page.words).split())
    assert "no task parameters by name" in words
    assert "over-confident" in words
    assert "noise scale" not in words, "advice for numbers"
    assert "Reliability diagram" in page.all("img")[0]["alt"]
    expected = bm.scores(labels, batch)
    assert page.row("this model")[1].startswith(f"{expected['accuracy']:.1%}")


def test_what_cannot_be_used_is_refused(tmp_path):
    posterior, batch = case(tasks=4)
    with pytest.raises(OptionError, match=r"suffix '\.pdf'; expected \.html"):
        bm.write_report(tmp_path / "r.pdf", posterior, batch)
    with pytest.raises(OptionError, match="examples=0"):
        bm.write_report(tmp_path / "r.html", posterior, batch, examples=0)
    with pytest.raises(OptionError, match="'mine' has the scores crps; expected 'nll'"):
        bm.write_report(tmp_path / "r.html", posterior, batch, baselines={"mine": {"crps": 1.0}})
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="cannot be written"):
        bm.write_report(tmp_path / "file" / "r.html", posterior, batch)
    with pytest.raises(RunFolderError, match="holds no run"):
        kind_of(tmp_path)
    (tmp_path / "config.json").write_text('{"settings": {"mine": 1}}')
    with pytest.raises(RunFolderError, match="run of your own"):
        kind_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match="damaged"):
        kind_of(tmp_path)


# -- what it warns of ---------------------------------------------------------------------------------------------


class WithDensity(Linear):
    """Has a density of φ, and the evidence of its support in closed form."""

    @property
    def log_evidence(self):
        return self.tasks.log_evidence(self.support)

    def _normal(self, u, mean, covariance):
        return torch.distributions.MultivariateNormal(mean, covariance).log_prob(u)

    def log_prob(self, u):
        return self._normal(u, self.mean, self.covariance)

    def log_prior(self, draws):
        return self._normal(draws.u, self.tasks.mean, self.tasks.covariance)

    def log_likelihood(self, observations, *, draws):
        """Of the model, whatever the factor."""
        mean = torch.einsum("tsd,ntd->nts", observations.x, draws.u)
        value = torch.distributions.Normal(mean, float(self.tasks.noise)).log_prob(observations.y)
        return torch.where(observations.full_mask(), value, 0.0)


def test_surprise_is_the_evidence_of_the_support(tmp_path):
    posterior, batch = case(kind=WithDensity)
    family, more = linear_tasks(99, seed=5)
    known = WithDensity(family, more.support)
    found = alarms.strangeness(posterior, known, 100, 0)
    torch.testing.assert_close(found.scores, -family.log_evidence(batch.support))
    torch.testing.assert_close(found.p_values, bm.surprise(posterior).p_values(bm.surprise(known)))
    assert (found.reference, found.remark, alarms.strange_tasks(found)) == (99, "", [])
    chosen = findings.choose(bm.scores(posterior, batch), bm.calibration(posterior, batch), 2, found)
    order = [i for i in found.scores.argsort(descending=True).tolist() if i not in chosen.worst]
    assert chosen.surprising == order[:2]
    page, _ = read(bm.write_report(tmp_path / "r.html", posterior, batch, validation=known))
    words = " ".join("".join(page.words).split())
    task = order[0]
    number = f"{float(found.scores[task]):.3g}".replace("-", "−")
    p_value = float(found.p_values[task])
    sign = "≤" if p_value == pytest.approx(1 / 100) else "="
    assert f"surprise of the support {number} nats, p {sign} {p_value:.2g} among 99" in words
    assert sign == "≤", "none of the 99 is as surprising: no smaller value is possible"
    assert "whose support was least to be expected" in words
    page, _ = read(bm.write_report(tmp_path / "r.html", posterior, batch, examples=1))
    assert "No validation tasks were given" in "".join(page.words)


@pytest.mark.parametrize("shift", [-0.7, 0.7])
def test_bias_is_warned_of_with_its_size(shift):
    family, batch = linear_tasks(60, seed=4)
    posterior = Linear(family, batch.support, 0.6, shift)  # too narrow, which alone the verdict says
    verdict = bm.calibration(posterior, batch)
    assert verdict.finding == "over-confident"
    (text,) = findings.warnings_of(bm.scores(posterior, batch), verdict, posterior)
    share = ((batch.query.y - posterior.predictive(batch.query).mean) * shift < 0).double().mean()
    side = "above" if shift < 0 else "below"
    assert re.match(rf"Bias: {share:.0%} ± \d% of the outcomes lie {side} the middle", text)
    level = Linear(family, batch.support, 0.6)
    assert findings.warnings_of(bm.scores(level, batch), bm.calibration(level, batch), level) == []


def test_tasks_from_elsewhere_are_warned_of():
    family, batch = linear_tasks(60, seed=4)
    known = WithDensity(family, linear_tasks(80, seed=5)[1].support)
    support = batch.support.with_y(torch.where(torch.arange(60).unsqueeze(-1) < 15, 8.0, 0.0) + batch.support.y)
    found = alarms.strangeness(WithDensity(family, support), known, 100, 0)
    (text,) = alarms.strange_tasks(found)
    count = int((found.p_values <= 0.05).sum())
    assert 14 <= count <= 22
    assert text.startswith(f"{count} of 60 tasks ({count / 60:.0%}) are more surprising than 95% of the 80 validation")
    alone = alarms.strangeness(WithDensity(family, support), None, 100, 0)
    assert alone.p_values is None
    assert alarms.strange_tasks(alone) == [], "nothing is known without validation tasks"


def test_an_evidence_that_is_not_known_is_not_used(tmp_path):
    """Few of the prior's draws fit forty precise shots."""
    family, batch = linear_tasks(20, seed=4, shots=40, noise=0.01)
    posterior = Linear(family, batch.support)
    found = alarms.strangeness(posterior, None, 200, 0)
    assert found.scores is None
    assert "effective draws in the median task" in found.remark
    page, _ = read(bm.write_report(tmp_path / "r.html", posterior, batch, num_samples=200))
    words = "".join(page.words)
    assert "effective draws in the median task" in words
    assert "farthest out in the tails" in words


def test_a_posterior_that_its_own_weights_contradict_is_warned_of():
    family, batch = linear_tasks(20, seed=4)
    assert alarms.trust(WithDensity(family, batch.support), batch, 0) == alarms.Trust([], [])
    (text,) = alarms.trust(WithDensity(family, batch.support, 0.3), batch, 0).warnings
    assert text.startswith("Pareto k is above")
    assert text == bm.psis(WithDensity(family, batch.support, 0.3), num_samples=1000, generator=0).verdict
    (told,) = alarms.trust(WithDensity(family, batch.support, 0.3), batch, 0, {"trust": "Use --method X."}).warnings
    assert told.endswith("relied on. Use --method X.")
    assert told.partition(". Use")[0] == text.partition(". Take")[0]
    assert alarms.trust(Linear(family, batch.support, 0.3), batch, 0) == alarms.Trust([], []), "no density to judge"
    wide = alarms.trust(WithDensity(family, batch.support, 1.6), batch, 0)
    assert wide.warnings == []
    assert "usable, in 100% of tasks" in wide.notes[0]


def losses(values, key="loss"):
    return [{"step": 10 * (i + 1), key: float(value)} for i, value in enumerate(values)]


def test_training_that_diverged_or_did_not_converge_is_warned_of():
    rng = np.random.default_rng(0)
    time = np.arange(60)
    settled = 5 * np.exp(-time / 6) + 0.05 * rng.normal(size=60)
    assert alarms.training(losses(settled)) == []
    (text,) = alarms.training(losses(5 - time / 12 + 0.05 * rng.normal(size=60)))
    fall = re.fullmatch(r"The training loss was still falling when training ended, by (.*) nats a task over .*", text)
    assert float(fall[1]) == pytest.approx(19 / 12, abs=0.15)
    assert text.endswith("Train for more than 600 steps.")
    (text,) = alarms.training(losses(settled + time**2 / 100))
    assert "rose from" in text
    assert "diverged" in text
    (text,) = alarms.training(losses([3.0, 2.0, float("nan"), 1.0]))
    assert "not finite at step 30" in text
    over = losses(settled + time / 10, "validation")
    assert alarms.training(over, best_step=120) == [], "the best step was kept"
    (text,) = alarms.training(over)
    assert "by heart" in text
    (text,) = alarms.training(losses([9.0, 5.0, 1.0]))
    assert text.startswith("Only 30 training steps were made")
    assert alarms.training(losses([9.0, 5.0, 1.0]), planned_steps=1000) == [], "stopped by patience"
    few = losses([9.0, 5.0, 1.0, 0.9, 0.8, 0.1], "validation")
    (text,) = alarms.training(few, 60)
    assert "lowest at the last step" in text
    assert alarms.training(losses([9.0, 5.0, 1.0, 0.9, 0.8, 0.79], "validation"), 60) == [], "by a hair"
    assert alarms.training(losses([9.0, 5.0, 1.0, 0.9, 0.8, 0.1])) == [], "a training loss varies by chance"
    assert alarms.training([]) == []


def test_a_training_that_patience_stopped_is_not_told_to_go_on():
    time = np.arange(60)
    falls = losses(np.where(time < 20, 5 - time / 4, 9 - time / 12), "validation")  # never got back
    assert min(falls, key=lambda line: line["validation"])["step"] == 200
    assert alarms.training(falls, best_step=200) == []
    still = losses(5 - time / 12, "validation")
    (text,) = alarms.training(still, best_step=600)
    assert "still falling" in text
    assert alarms.training(still, 600, 600) == [text], "control: the steps ran out"
    assert alarms.training(still, 600, 1000) == []
    assert alarms.training(still, 600, 600, {"steps": "More."})[0].endswith("converged. More.")
    words = alarms.course(still, 200, 1000, "--steps")
    assert words == "600 steps, stopped by patience before --steps 1000; kept: step 200, best on validation"
    assert alarms.course(still, 600, 600) == (
        "600 steps, to the end of the 600 planned; kept: step 600, the last, best on validation"
    )
    assert alarms.course([], 3, 4) == ""


def test_one_loss_is_shown(tmp_path):
    posterior, batch = case()
    log = [{"step": 5, "loss": 11.62, "validation": 8.264}]
    page, _ = read(bm.write_report(tmp_path / "r.html", posterior, batch, log=log, best_step=5, planned_steps=5))
    words = " ".join("".join(page.words).split())
    assert "training loss 11.62 at step 5, loss on the validation tasks 8.264 at step 5" in words
    assert "Only 5 training steps were made" in words
    assert page.row("training") == ["5 steps, to the end of the 5 planned; kept: step 5, the last, best on validation"]


def test_praise_needs_tasks_and_a_gain_beyond_chance(tmp_path):
    for tasks, praised in ((40, True), (12, False)):
        posterior, batch = case(tasks=tasks)
        assert bm.calibration(posterior, batch).finding == "calibrated"
        page, _ = read(bm.write_report(tmp_path / "r.html", posterior, batch))
        assert ("Good. 90% intervals cover" in "".join(page.words)) == praised
    narrow = bm.scores(case(tasks=40, factor=0.3)[0], case(tasks=40)[1])
    posterior, batch = case(tasks=40)
    gap = findings.gaps(bm.scores(posterior, batch), {"n": narrow})["n"]
    each = narrow.per_task["nll"] - bm.scores(posterior, batch).per_task["nll"]
    assert gap.mean == pytest.approx(float(each.mean()))
    assert gap.error == pytest.approx(float(each.std()) / 40**0.5)
    assert findings.beaten_by({"n": findings.Gap(-1.0, 0.1)}, {"baseline": "Do X."})[0].endswith("over it. Do X.")
    assert not findings.Gap(5.0, math.nan).sure
    posterior, batch = case(tasks=1)
    page, _ = read(bm.write_report(tmp_path / "r.html", posterior, batch, baselines={"n": {"nll": 99.0}}))
    assert "Good." not in "".join(page.words)
    assert "lower than that of the baseline in the table, though that may be chance" in "".join(page.words)


def test_losses_that_only_vary_are_seldom_warned_of():
    rng = np.random.default_rng(1)
    warned = sum(bool(alarms.training(losses(rng.normal(size=60)))) for _ in range(300))
    assert warned <= 6  # three standard errors to one side, of t with 18 degrees of freedom: 0.4%; and of the rise


# -- folders ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("fit")
    rng = np.random.default_rng(0)
    town = np.repeat(np.arange(24), 6)
    frame = pd.DataFrame({"town": town, "age": rng.uniform(20, 80, 144)})
    frame["bill"] = rng.normal(100, 20, 24)[town] + 0.5 * frame["age"] + rng.normal(0, 5, 144)
    frame.to_csv(place / "bills.csv", index=False)
    options = {"task": "town", "x": ["age"], "y": ["bill"], "steps": 40, "hidden": [8], "holdout": 0.5}
    fit_csv(place / "bills.csv", place / "run", **options, device="cpu", progress=False, **QUIET)
    return place


def test_the_folder_of_a_fit(folder):
    from bayesmeta.tabular.evaluate import evaluate_csv

    assert kind_of(folder / "run") == "tabular"
    page, _ = read(report_csv(folder / "run", device="cpu", **QUIET))
    told = evaluate_csv(folder / "run", folder / "bills.csv", device="cpu", **QUIET)["scores"]
    for who, key in (
        ("BayesianLastLayer", "BayesianLastLayer"),
        ("pooled line", "pooled"),
        ("line per task", "unpooled"),
    ):
        number = page.row(who)[0].split(" ± ")[0]
        assert float(number) == pytest.approx(told[key]["nll"], abs=0.6 * 10.0 ** -len(number.partition(".")[2]))
    assert page.row("tasks scored here")[0].startswith("12, ")
    assert page.row("target") == ["bill"]


def test_a_run_whose_rows_are_gone_says_so(folder, tmp_path):
    moved = shutil.copytree(folder / "run", tmp_path / "run")
    config = json.loads((moved / "config.json").read_text())
    config["settings"]["csv"] = str(tmp_path / "gone.csv")
    (moved / "config.json").write_text(json.dumps(config))
    said = []
    page, _ = read(report_csv(moved, device="cpu", say=said.append))
    assert "Nothing was scored" in said[0]
    assert "Nothing was scored" in "".join(page.words)
    assert page.row("target") == ["bill"]
    page, _ = read(report_csv(moved, folder / "bills.csv", device="cpu", **QUIET))
    assert page.row("judged by") == [str(folder / "bills.csv")]


# -- a browser ----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
#: Put into a copy of the page, since the page has no script of its own.
PROBE = """<script>addEventListener("load", () => { const t = performance.timing, d = document.documentElement;
const colour = e => { const s = getComputedStyle(e); return [s.color, s.backgroundColor]; };
d.dataset.result = JSON.stringify({wide: d.scrollWidth, room: d.clientWidth, body: colour(document.body),
load: t.loadEventStart - t.navigationStart, images: [...document.images].map(i => i.naturalWidth > 0),
requests: performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:"))}); });
</script>"""
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # no name is found, so that nothing is loaded from elsewhere


def chromium(folder, page, *flags):
    home = os.environ | {"HOME": str(folder)}
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=home)


def browse(text, folder, *more):
    """What a browser finds of a page in a frame of 360 pixels, and what stands in its console.

    A window of headless Chromium is at least 500 wide; a frame is as narrow as it is told to be.
    """
    text = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'", 1)
    (folder / "page.html").write_text(text.replace("</head>", f"{PROBE}</head>", 1))
    (folder / "frame.html").write_text(
        '<!DOCTYPE html><iframe src="page.html" style="width:360px;height:800px;border:0"></iframe><script>'
        'addEventListener("load", () => document.body.append(frames[0].document.documentElement.dataset.result))'
        "</script>"
    )
    result = chromium(folder, folder / "frame.html", "--enable-logging=stderr", "--dump-dom", *more)
    found = re.search(r"\{.*\}", re.sub("<script>.*?</script>", "", result.stdout, flags=re.DOTALL))
    assert found, result.stdout[-500:] + result.stderr[-500:]
    return json.loads(found[0]), [line for line in result.stderr.splitlines() if "CONSOLE" in line]


needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)"
)


@needs_chromium
def test_chromium_loads_it_fast_and_narrow(written, tmp_path):
    told, console = browse(written[0].read_text(), tmp_path)
    assert told["room"] == 360
    assert told["wide"] <= 360
    assert len(told["images"]) == 13
    assert all(told["images"])
    # the machine may be busy with other things: the best of three
    loads = [told["load"], *(browse(written[0].read_text(), tmp_path)[0]["load"] for _ in range(2))]
    assert 0 < min(loads) < 1000
    assert told["requests"] == []
    assert told["body"] == ["rgb(27, 27, 27)", "rgb(255, 255, 255)"]
    assert console == []


@needs_chromium
def test_chromium_shows_it_dark_where_that_is_asked_for(written, tmp_path):
    told, _ = browse(written[0].read_text(), tmp_path, "--blink-settings=preferredColorScheme=0")
    assert told["body"] == ["rgb(232, 232, 232)", "rgb(22, 24, 27)"]


@needs_chromium
def test_chromium_prints_it(written, tmp_path):
    """On sheets of paper; the page's own policy lets no script run."""
    paper = tmp_path / "page.pdf"
    chromium(tmp_path, written[0], f"--print-to-pdf={paper}")
    pdf = paper.read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 20


@needs_chromium
def test_the_browser_of_these_tests_finds_faults(written, tmp_path):
    wide = '<div style="width:900px">wide</div><img alt="none" src="https://example.invalid/x.png"></main>'
    told, console = browse(written[0].read_text().replace("</main>", wide), tmp_path)
    assert told["wide"] > 360
    assert not all(told["images"])
    assert told["load"] > 0
    assert any("example.invalid" in line for line in console)  # the page's own policy refuses to load it

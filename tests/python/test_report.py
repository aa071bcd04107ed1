"""What people look at: a report's line, its HTML and its figure, and progress."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import parastep
from parastep.options import Options
from parastep.report import HELPER_LOST, Evaluation, Failure, Share, TeamRecord
from parastep.report.plot import COLOURS

STEPS = 12
VOID = {"br", "img", "hr", "input", "meta", "link"}


def sampled(tolerance=0.02, ranks=3, **options):
    program = parastep.Program.flow_euler(np.linspace(1, 0, STEPS + 1))
    x = np.random.default_rng(0).standard_normal((2, 8))
    options |= {"ranks": ranks, "tolerance": tolerance, "max_stride": 1}
    _, report = parastep.sample(program, lambda x, step, rank: np.tanh(3 * x), x, **options)
    return report


def strided():
    """A report as strided rounds leave one: 7 steps, of which 3 lie between nodes, 1 after."""
    line = [(0, 0, 0, True), (0, 2, 1, True), (2, 5, 1, True), (1, 5, 0, False)]
    timeline = [
        Evaluation(rank, step, number, number + 0.1, number + 0.9, accepted)
        for rank, step, number, accepted in line
    ]
    return parastep.Report(
        steps=7, ranks=3, rounds=3, evaluations=[2, 2, 1], interpolated=3, accepted=[1, 5, 1],
        drift=[math.nan, 0.01, 0.002, 0.0, 0.004, 0.001, 0.5], timeline=timeline, seconds=2.5,
        answered=5, tolerance=0.02,
    )  # fmt: skip


SERVED = Share(1, 0, 0.1, 0.8), Share(1, 2, 1.1, 1.9), Share(1, 6, 2.0, 2.4)
PAIR = TeamRecord(["cuda:0", "cuda:1"], "calls (bit for bit)", None, 19, 1, 2, SERVED)
ALONE = TeamRecord(["cuda:2", "cuda:3"], None, "unet cannot be\ncut: <another> shape", 0, 0, 7)


def teamed(**changes):
    return dataclasses.replace(strided(), **{"teams": [PAIR, ALONE]} | changes)


class Checker(html.parser.HTMLParser):
    """Every tag is closed, none runs or fetches anything."""

    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("src", "href"), (tag, name)
            assert "url(" not in (value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_data(self, data):
        self.text += data


def drawings(page):
    parts = page.split("<svg")[1:]
    return [ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>") for part in parts]


def test_line():
    report = sampled()
    line = f"{STEPS} steps in {report.rounds} rounds on 3 ranks ({report.speedup:.2f}x in forwards)"
    assert str(report).startswith(line) and "interpolated" not in str(report)
    assert repr(report) == f"<parastep.Report: {report}>"
    many = dataclasses.replace(strided(), rounds=1, fallback="two\nlines", ranks=1)
    assert "in 1 round on 1 rank (" in str(many) and ", 3 interpolated" in str(many)
    assert str(many).endswith("went on serially: two lines")


def test_a_line_for_each_rank_of_several_devices():
    report = teamed()
    line, first, second = str(report).splitlines()
    assert line == str(strided()) and repr(report) == repr(strided())
    assert first == (
        "rank 0: cuda:0 + cuda:1, split by calls (bit for bit): 19 forwards shared, 2 whole, "
        "1 foretold wrongly"
    )
    assert second == "rank 1: cuda:2 + cuda:3, unsplit: unet cannot be cut: <another> shape"
    assert str(PAIR._replace(shared=1, missed=0, whole=0)).endswith(
        "(bit for bit): 1 forward shared"
    )
    assert parastep.Report.from_dict(json.loads(json.dumps(report.to_dict()))).teams == report.teams


def test_teams_are_told_where_a_report_is_shown():
    page = Checker(teamed()._repr_html_())
    assert all(line in page.text for line in str(teamed()).splitlines())
    assert "another" not in page.seen
    assert "rank 0helperrank 1rank 2" in page.text
    paths = drawings(teamed()._repr_html_())[0].iter("path")
    # Four evaluations; of the helper's three shares two are of them, one is of none.
    counts = {path.get("fill"): path.get("d").count("M") for path in paths}
    found = [counts[COLOURS[kind]] for kind in ("exact", "accepted", "rejected")]
    assert found == [2, 3, 2] and sum(counts.values()) == 7
    pytest.importorskip("matplotlib")
    figure = teamed().plot()
    assert figure.get_suptitle().splitlines() == teamed().team_lines
    timeline = figure.axes[0]
    assert [label.get_text() for label in timeline.get_yticklabels()] == [
        "rank 0",
        "helper",
        "rank 1",
        "rank 2",
    ]
    rows = [patch.get_y() + patch.get_height() / 2 for patch in timeline.patches]
    assert sorted(map(round, rows)) == [0, 0, 1, 1, 1, 2, 3]
    many = teamed(ranks=20, teams=[PAIR] * 20).plot().get_suptitle().splitlines()
    assert len(many) == 9 and many[-1] == "and 12 ranks more"
    alone = strided().plot()
    assert alone.get_suptitle() == ""
    labels = [label.get_text() for label in alone.axes[0].get_yticklabels()]
    assert labels == ["rank 0", "rank 1", "rank 2"]


def test_a_helper_is_no_rank():
    helper = Failure(0, 3, HELPER_LOST, "its helper on cuda:1 was lost: no output within 60 s")
    left = Failure(1, 3, "FAILED", "it raised")
    line = teamed(failures=[helper]).line
    assert line.endswith("1 helper lost") and "left out" not in line
    assert "1 rank left out, 2 helpers lost" in teamed(failures=[helper, left, helper]).line
    assert "helper" not in teamed(failures=[left]).line
    assert helper.text in Checker(teamed(failures=[helper])._repr_html_()).text


def test_at_exact_the_limit_tells_who_worked():
    options = Options("exact")
    assert options.idle_reason(2, PAIR).endswith(
        "1 of 2 ranks are idle; the 2 devices of rank 0 shared 19 forwards, bit for bit"
    )
    alone = options.idle_reason(1, ALONE)
    assert "idle" not in alone and alone.endswith(f"the first worked alone: {ALONE.unsplit}")
    assert "devices" not in options.idle_reason(4)
    assert Options("high").idle_reason(2, PAIR) is None


@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 0.02, math.inf])
def test_a_run_knows_its_tolerance(tolerance):
    report = sampled(tolerance)
    assert report.tolerance == tolerance
    json.loads(json.dumps(report.to_dict(), allow_nan=False))


def test_the_published_rule_has_no_tolerance():
    report = sampled(policy="paper")
    assert report.tolerance is None
    Checker(report._repr_html_())


def test_kinds():
    assert strided().kinds == [
        "exact", "interpolated", "accepted", "interpolated", "interpolated", "accepted", "exact",
    ]  # fmt: skip
    found = sampled(math.inf).kinds
    assert found[:5] == ["exact", "exact", "accepted", "accepted", "exact"]
    assert set(sampled(0).kinds) == {"exact"} and parastep.Report().kinds == []


def test_html_is_whole_and_runs_nothing():
    for report in (sampled(), sampled(0), sampled(math.inf, 1), strided(), parastep.Report()):
        page = Checker(report._repr_html_())
        assert "script" not in page.seen and "style" not in page.seen and "iframe" not in page.seen
        assert str(report) in page.text


def test_html_escapes():
    nasty = '"><script>alert(1)</script>&'
    report = dataclasses.replace(
        strided(), fallback=nasty, failures=[Failure(1, 5, nasty, nasty), Failure(2, 6, "A", "b")]
    )
    page = Checker(report._repr_html_())
    assert "script" not in page.seen and page.text.count(nasty) == 3


def test_html_shows_every_evaluation_and_every_drift():
    timeline, drift = drawings(strided()._repr_html_())
    paths = {path.get("fill"): path.get("d") for path in timeline.iter("path")}
    counts = {kind: paths.get(colour, "").count("M") for kind, colour in COLOURS.items()}
    assert counts == {"exact": 1, "accepted": 2, "rejected": 1, "interpolated": 0}
    circles = [circle.get("fill") for circle in drift.iter("circle")]
    # Of seven, one has no guess and one is 0; the last one's guess was too far off.
    assert sorted(circles) == sorted(
        COLOURS[kind] for kind in ("interpolated",) * 2 + ("accepted",) * 2 + ("rejected",)
    )


def test_html_of_a_long_run_is_small():
    ranks, steps = 64, 1000
    timeline = [Evaluation(k % ranks, k, k // ranks, k / 9, k / 9 + 1, True) for k in range(steps)]
    report = parastep.Report(
        steps=steps, ranks=ranks, rounds=16, timeline=timeline, drift=[1e-3] * steps, tolerance=0.01
    )
    assert len(report._repr_html_()) < 200_000


def test_figure():
    pytest.importorskip("matplotlib")
    figure = strided().plot()
    timeline, drift, taken = figure.axes
    assert len(timeline.patches) == 4
    assert sum(len(line.get_xdata()) for line in drift.lines if line.get_marker() == "o") == 5
    heights = [patch.get_height() for patch in taken.patches]
    assert sum(heights) == 7 and len(heights) == 4  # the second round took two kinds of steps
    assert figure._repr_png_().startswith(b"\x89PNG")
    for report in (sampled(0), sampled(math.inf), parastep.Report()):
        report.plot()._repr_png_()


def test_figure_of_the_users_own():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = pyplot.figure()
    try:
        assert sampled().plot(figure) is figure and len(figure.axes) == 3
    finally:
        pyplot.close(figure)


def test_matplotlib_is_not_needed_before_a_figure_is_asked_for():
    code = """if True:
        import sys
        sys.modules["matplotlib"] = None
        import parastep
        report = parastep.Report(steps=2, rounds=1)
        report._repr_html_(), str(report)
        try:
            report.plot()
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install matplotlib" in done.stdout


def test_progress_counts_steps(capsys):
    pytest.importorskip("tqdm")
    report = sampled(math.inf, progress=True)
    shown = capsys.readouterr()
    assert report.rounds < STEPS and f"{STEPS}/{STEPS}" in shown.err and "step/s" in shown.err
    sampled()
    assert capsys.readouterr() == ("", "")


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        sampled(progress=True)

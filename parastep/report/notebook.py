"""A report as HTML, which Jupyter shows: one line, two pictures, what went wrong.

Self-contained: inline SVG, no script, no style sheet, nothing that other outputs could clash with.
Text takes the page's own colour, so that it can be read on a dark page too.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from .plot import COLOURS, LABELS, drawn, drifts, rows
from .record import Record

_WIDTH, _LEFT = 760, 52  # pixels; what is left of the pictures' own area
_ROW = 18
_LABELLED_ROWS = 32  # above it they are too many for numbers
_TEXT = 'fill="currentColor" font-size="10" font-family="sans-serif"'


def html_of(report: Record) -> str:
    """The whole of it, as `Report._repr_html_` returns it."""
    parts = [f"<p><b>{html.escape(report.line)}</b></p>"]
    if report.timeline:
        parts += [_legend(report), _timeline(report)]
    if drifts(report):
        parts.append(_drift(report))
    parts += [f"<p>{html.escape(line)}</p>" for line in report.team_lines]
    parts += [f"<p>{line}</p>" for line in _facts(report)]
    if report.failures:
        parts.append(_failures(report))
    return f'<div style="max-width:{_WIDTH}px">{"".join(parts)}</div>'


def _facts(report: Record) -> Iterable[str]:
    evaluations = ", ".join(map(str, report.evaluations))
    yield f"evaluations of each rank: {evaluations}; {report.bytes_sent / 1e6:.3g} MB sent"
    if 0 < report.forwards < sum(report.evaluations):
        yield f"several steps in one batch: {report.forwards} forwards"
    if report.unbatched is not None:
        yield f"steps not in one batch: {html.escape(report.unbatched)}"
    if report.interpolated:
        yield f"{report.interpolated} steps were interpolated: estimated, not verified"
    if report.limit is not None:
        yield html.escape(report.limit)
    if report.not_finite:
        yield f"{report.not_finite} outputs of the leader hold NaN or Inf"


def _failures(report: Record) -> str:
    rows = "".join(
        f"<tr><td>{line.rank}</td><td>{line.step}</td><td>{html.escape(line.status)}</td>"
        f'<td style="text-align:left">{html.escape(line.text)}</td></tr>'
        for line in report.failures
    )
    head = "<tr><th>left out</th><th>at step</th><th></th><th></th></tr>"
    return f"<table>{head}{rows}</table>"


def _legend(report: Record) -> str:
    shown = {*report.evaluated, *report.kinds}
    parts = [
        f'<span style="color:{colour}">&#9632;</span> {html.escape(LABELS[kind])}'
        for kind, colour in COLOURS.items()
        if kind in shown
    ]
    return f"<p>{' &nbsp; '.join(parts)}</p>"


def _svg(height: int, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg role="img" aria-label="{html.escape(label)}" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" style="max-width:100%;height:auto">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    escaped = html.escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {_TEXT}>{escaped}</text>'


def _timeline(report: Record) -> str:
    """A row a device, seconds to the right; one path a kind, which keeps long runs small."""
    shown, (names, _) = drawn(report), rows(report)
    seconds = max(report.seconds, max(end for *_, end, _ in shown), 1e-9)
    scale = (_WIDTH - _LEFT - 8) / seconds
    paths: dict[str, list[str]] = {kind: [] for kind in COLOURS}
    numbers = []
    for row, step, begin, end, kind in shown:
        x, width = _LEFT + begin * scale, (end - begin) * scale
        y = row * _ROW + 2
        paths[kind].append(f"M{x:.1f} {y}h{max(width - 0.5, 0.3):.1f}v{_ROW - 4}H{x:.1f}z")
        if width >= 7 * len(str(step)) and len(names) <= _LABELLED_ROWS:
            numbers.append(_text(x + width / 2, y + 11, str(step), "middle"))
    parts = [f'<path d="{"".join(d)}" fill="{COLOURS[k]}"/>' for k, d in paths.items() if d]
    apart = 1 + (len(names) - 1) // _LABELLED_ROWS
    labels = [_text(0, k * _ROW + 13, names[k]) for k in range(0, len(names), apart)]
    foot = len(names) * _ROW + 12
    ends = [_text(_LEFT, foot, "0 s"), _text(_WIDTH - 8, foot, f"{seconds:.3g} s", "end")]
    label = "timeline: which device evaluated which step when"
    return _svg(foot + 4, [*parts, *numbers, *labels, *ends], label)


def _drift(report: Record) -> str:
    """Drift of each step on a logarithmic axis, one decade a line."""
    height, top = 110, 6
    shown = [value for _, value, _ in drifts(report)]
    low = math.floor(math.log10(min(shown)))
    high = max(math.ceil(math.log10(max(shown))), low + 1)

    def y_of(value: float) -> float:
        return top + height * (high - math.log10(value)) / (high - low)

    x_scale = (_WIDTH - _LEFT - 8) / max(len(report.drift), 1)
    parts = []
    for power in range(low, high + 1, 1 + (high - low) // 8):
        y = y_of(10.0**power)
        parts.append(_line(y, 'stroke="currentColor" stroke-opacity="0.2"'))
        parts.append(_text(_LEFT - 4, y + 3, f"1e{power}", "end"))
    for step, value, kind in drifts(report):
        x, colour = _LEFT + (step + 0.5) * x_scale, COLOURS[kind]
        parts.append(f'<circle cx="{x:.1f}" cy="{y_of(value):.1f}" r="2.5" fill="{colour}"/>')
    foot, last = top + height + 14, len(report.drift) - 1
    parts += [_text(_LEFT, foot, "drift of step 0"), _text(_WIDTH - 8, foot, f"step {last}", "end")]
    return _svg(foot + 4, parts, "drift of each step")


def _line(y: float, style: str) -> str:
    return f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" {style}/>'

"""The trials of a hyper-parameter search for people: a table, and parallel coordinates on one HTML page.

In the picture each setting has an axis of its own, then come the epochs and the metric; a trial is a
line through its values. Pure functions of `front.json`, so a page can be made again from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

Row = Mapping[str, Any]

WIDTH, HEIGHT = 960, 420  # of the picture, in its own units
LEFT, RIGHT, TOP, BOTTOM = 70, 90, 56, 40  # its margins
WORST, BEST = (196, 203, 211), (11, 110, 79)  # colours of the worst and the best trial

STYLE = """
:root { --ink: #1b1f24; --soft: #5d6670; --line: #dde2e7; --paper: #ffffff; --wash: #f1f7f4; }
body { margin: 0; background: #f6f7f8; color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1040px; margin: 32px auto; padding: 28px 36px; background: var(--paper);
  border: 1px solid var(--line); border-radius: 10px; }
h1 { margin: 0 0 4px; font-size: 22px; } p { margin: 0 0 14px; color: var(--soft); }
svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: var(--soft);
  paint-order: stroke; stroke: var(--paper); stroke-width: 4px; pointer-events: none; }
svg text.name { fill: var(--ink); font-weight: 600; }
polyline { fill: none; stroke-linejoin: round; } polyline:hover { stroke-width: 5; stroke-opacity: 1; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: 22px; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); }
th { font-size: 13px; color: var(--soft); border-bottom: 2px solid var(--ink); }
td { white-space: nowrap; }
td.word, th.word { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tr.best td { background: var(--wash); font-weight: 600; } tr.dull td { color: #8b949e; }
"""


class Axis(NamedTuple):
    """One upright line: where a trial lies on it, in [0, 1] from the bottom, and what is written beside."""

    name: str
    place: Callable[[Row], float]
    ticks: Sequence[tuple[float, str]]


def ranked(front: Mapping[str, Any]) -> list[Row]:
    """The trials, best first (of equal ones the first), then those that failed."""
    sign = -1 if front["goal"] == "max" else 1
    good = [row for row in front["trials"] if not row["error"]]
    good.sort(key=lambda row: (sign * row["metrics"][front["metric"]], row["number"]))
    return good + [row for row in front["trials"] if row["error"]]


def table(front: Mapping[str, Any]) -> str:
    """Text, one line a trial and one of the epochs that were spent."""
    lines = [["trial", "settings", front["metric"], "epochs", "seconds"], *map(_cells(front), ranked(front))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    told = ["  ".join(cell.ljust(wide) for cell, wide in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([*told, *_spent(front)])


def page(front: Mapping[str, Any]) -> str:
    """The whole page: picture and table, no other file."""
    rows, best = ranked(front), front["chosen"]
    head = ("trial", "settings", front["metric"], "epochs", "seconds")
    lines = []
    for row, cells in zip(rows, map(_cells(front), rows)):
        kind = "best" if row["trial"] == best else "dull" if row["error"] or row["stopped"] else ""
        lines.append(f'<tr class="{kind}">{_tags("td", cells)}</tr>')
    how = "Each line is a trial, the greener the better; a dashed one was stopped early."
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>recray tune</title><style>{STYLE}</style></head><body><main>
<h1>{len(rows)} trials by {escape(front["metric"])}</h1>
<p>{" ".join([how, *map(escape, _spent(front))])}</p>
{picture(front)}
<table><thead><tr>{_tags("th", head)}</tr></thead><tbody>{"".join(lines)}</tbody></table>
</main></body></html>
"""


def picture(front: Mapping[str, Any]) -> str:
    """Parallel coordinates as SVG; trials that failed have no line."""
    rows = [row for row in ranked(front) if not row["error"]]
    axes = _axes(front, rows)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(axes) - 1)
    lines, words = [], []
    for number, axis in enumerate(axes):
        x = LEFT + number * step
        above = TOP - 18 - 16 * (number % 2)  # names of neighbours do not run into each other
        lines.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--soft)"/>'
        )
        words.append(
            f'<text class="name" x="{x:.1f}" y="{above}" text-anchor="middle">{escape(axis.name)}</text>'
        )
        words += [
            f'<text x="{x + 6:.1f}" y="{_y(share) + 4:.1f}">{escape(told)}</text>'
            for share, told in axis.ticks
        ]
    shades = [1 - rank / max(1, len(rows) - 1) for rank in range(len(rows))]
    for row, shade in reversed(list(zip(rows, shades))):  # the best on top
        points = " ".join(f"{LEFT + n * step:.1f},{_y(a.place(row)):.1f}" for n, a in enumerate(axes))
        width = 4 if row["trial"] == front["chosen"] else 2
        dashes = ' stroke-dasharray="6 4"' if row["stopped"] else ""
        told = (
            f"trial {row['number']}: {row['words']}, {front['metric']} {row['metrics'][front['metric']]:.4f}"
        )
        lines.append(
            f'<polyline points="{points}" stroke="{_colour(shade)}" stroke-width="{width}"{dashes}>'
            f"<title>{escape(told)}</title></polyline>"
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Settings and result of every trial">'
        f"{''.join([*lines, *words])}</svg>"
    )


def _axes(front: Mapping[str, Any], rows: Sequence[Row]) -> list[Axis]:
    metric = front["metric"]
    made = [_setting(axis) for axis in front["axes"]]
    epochs = [row["epochs"] for row in rows if row["epochs"]]
    if epochs:
        made.append(_numbers("epochs", lambda row: row["epochs"] or 0, 0, max(epochs)))
    values = [row["metrics"][metric] for row in rows] or [0.0]
    low, high = sorted((min(values), max(values)), reverse=front["goal"] == "min")  # the best at the top
    made.append(_numbers(metric, lambda row: row["metrics"][metric], low, high))
    return made


def _setting(axis: Mapping[str, Any]) -> Axis:
    """The axis of a dimension of the space, as `front.json` tells of it."""
    name, choices = axis["name"], axis["choices"]
    if axis["kind"] != "choice":
        return _numbers(name, lambda row: row["point"][name], axis["low"], axis["high"], log=axis["log"])
    shares = [number / max(1, len(choices) - 1) for number in range(len(choices))]
    return Axis(
        name,
        lambda row: shares[choices.index(row["point"][name])] if row["point"][name] in choices else 0.0,
        list(zip(shares, map(str, choices))),
    )


def _numbers(name: str, value: Callable[[Row], float], low: float, high: float, *, log: bool = False) -> Axis:
    """An axis from `low` at the bottom to `high` at the top; they may fall as well."""
    to = math.log10 if log else float
    bottom, span = to(low), to(high) - to(low)

    def share(number: float) -> float:
        return min(max((to(number) - bottom) / span, 0.0), 1.0) if span else 0.5

    ticks = round_ticks(low, high, log) if span else [low]
    return Axis(name, lambda row: share(value(row)), [(share(tick), f"{tick:g}") for tick in ticks])


def grid(
    xs: Sequence[tuple[float, str]],
    ys: Sequence[tuple[float, str]],
    *,
    left: float,
    right: float,
    top: float,
    bottom: float,
) -> str:
    """Thin lines at the places of ticks, their words below and on the left."""
    parts = [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="var(--line)"/>'
        f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{word}</text>'
        for x, word in xs
    ]
    parts += [
        f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{word}</text>'
        for y, word in ys
    ]
    return "".join(parts)


def round_ticks(low: float, high: float, log: bool) -> list[float]:
    """A few round numbers between two, in any order; the two themselves where there would be fewer."""
    low, high = min(low, high), max(low, high)
    if log:
        made = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    else:
        rough = (high - low) / 5
        unit = 10 ** math.floor(math.log10(rough))
        step = next(times * unit for times in (1, 2, 5, 10) if times * unit >= rough)
        made = [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return made if len(made) > 1 else [low, high]


def _cells(front: Mapping[str, Any]) -> Callable[[Row], list[str]]:
    def cells(row: Row) -> list[str]:
        value = "failed" if row["error"] else f"{row['metrics'][front['metric']]:.4f}"
        epochs = f"{row['epochs']}/{row['of']}{' stopped' if row['stopped'] else ''}" if row["epochs"] else ""
        settings = f"{row['words']}: {row['error']}" if row["error"] else row["words"]
        return [str(row["number"]), settings, value, epochs, f"{row['seconds']:.1f}"]

    return cells


def _spent(front: Mapping[str, Any]) -> list[str]:
    """A sentence on the epochs; nothing where there are none."""
    spent, every = front["epochs"]["spent"], front["epochs"]["all"]
    return (
        [f"{spent} epochs were trained; every trial run out takes {every} ({spent / every:.0%})."]
        if every
        else []
    )


def _tags(tag: str, cells: Sequence[str]) -> str:
    words = ["", " class=word", "", "", ""]
    return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, words))


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def _colour(share: float) -> str:
    mixed = (round(bad + share * (good - bad)) for bad, good in zip(WORST, BEST))
    return "#" + "".join(f"{part:02x}" for part in mixed)

"""The front of a compression search for people: a table, a picture, and a page to explore it.

Two panels show quality over p99 and over bytes, both on a log scale, with the budget as a dashed line and
what it allows shaded. Beaten trials are grey, those over the budget hollow. On the page a trial that is
pointed at, clicked or reached with Tab is told of in full. Pure functions of `front.json`; the page is one
file that asks nothing of any host.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from recray.tuning.pareto import megabytes, milliseconds, money
from recray.tuning.picture import grid, round_ticks

Row = Mapping[str, Any]

PAGE, PICTURE = "front.html", "front.svg"
WIDTH, HEIGHT = 520, 400  # of one panel, in its own units
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 30, 46  # its margins
AXES = {"p99": "p99 of a request", "bytes": "bytes of tables, graphs and index"}
SHADES = {
    "--ink": "#1b1f24", "--soft": "#5d6670", "--line": "#dde2e7", "--paper": "#ffffff", "--best": "#0b6e4f",
    "--front": "#2f6fb3", "--dull": "#b4bcc5", "--limit": "#b3452f", "--wash": "#f1f7f4",
}  # fmt: skip
DRAWN = """
svg text { font: 12px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: var(--soft); }
svg text.strong { fill: var(--ink); font-weight: 600; } svg text.limit { fill: var(--limit); }
circle.mark { stroke-width: 2; fill-opacity: .75; } circle.over { fill-opacity: 0; }
circle.chosen { fill: var(--best); stroke: var(--best); } circle.front { fill: var(--front); stroke: var(--front); }
circle.dull { fill: var(--dull); stroke: var(--dull); }
"""  # noqa: E501
STYLE = """
body { margin: 0; background: #f6f7f8; color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 28px auto; padding: 28px 36px; background: var(--paper);
  border: 1px solid var(--line); border-radius: 10px; }
h1 { margin: 0 0 4px; font-size: 22px; } p { margin: 0 0 12px; } .soft { color: var(--soft); }
.panels { display: flex; gap: 12px; flex-wrap: wrap; } .panels svg { flex: 1 1 420px; min-width: 0; }
circle.mark { cursor: pointer; } circle.mark:focus { outline: none; }
circle.picked { stroke: var(--ink); stroke-width: 3.5; }
.hidden { display: none; } label { margin-right: 18px; }
#told { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 12px 0 18px; padding: 12px 16px;
  background: var(--wash); border-radius: 8px; min-height: 150px; overflow-wrap: anywhere; }
#told dt { color: var(--soft); } #told dd { margin: 0; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 9px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-size: 13px; color: var(--soft); border-bottom: 2px solid var(--ink); }
td.word, th.word { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tbody tr { cursor: pointer; } tr.chosen td { background: var(--wash); font-weight: 600; }
tr.dull td { color: #8b949e; } tr.picked td { box-shadow: inset 0 0 0 9px #e4ecf4; }
"""  # noqa: E501
SCRIPT = """
const trials = JSON.parse(document.getElementById('trials').textContent);
const told = document.getElementById('told');
const all = id => document.querySelectorAll('[data-trial="' + id + '"]');
function pick(id) {
  document.querySelectorAll('.picked').forEach(one => one.classList.remove('picked'));
  all(id).forEach(one => one.classList.add('picked'));
  told.replaceChildren();
  for (const [name, words] of trials[id]) {
    const term = document.createElement('dt'), text = document.createElement('dd');
    term.textContent = name; text.textContent = words; told.append(term, text);
  }
}
function sift() {
  const dull = document.getElementById('dull').checked, over = document.getElementById('over').checked;
  document.querySelectorAll('[data-trial]').forEach(one => one.classList.toggle('hidden',
    (dull && one.classList.contains('dull')) || (over && one.classList.contains('over'))));
}
document.querySelectorAll('[data-trial]').forEach(one => {
  for (const kind of ['mouseenter', 'focus', 'click'])
    one.addEventListener(kind, () => pick(one.dataset.trial));
});
document.querySelectorAll('input').forEach(one => one.addEventListener('change', sift));
if (document.body.dataset.first) pick(document.body.dataset.first);
"""


def table(front: Mapping[str, Any]) -> str:
    """Text, one line a trial: those that fit first, of them the best first, then what failed."""
    lines = [_head(front), *(_cells(row, front) for row in ranked(front))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.ljust(wide) for cell, wide in zip(line, widths)).rstrip() for line in lines
    )


def ranked(front: Mapping[str, Any]) -> list[Row]:
    """The trials in the order of the table."""
    metric = front["metric"]

    def place(row: Row) -> tuple[Any, ...]:
        if row["error"]:
            return (3, 0.0, row["number"])
        group = 0 if row["trial"] == front["chosen"] else 1 if row["fits"] else 2
        return (group, -row["metrics"][metric], row["number"])

    return sorted(front["trials"], key=place)


def picture(front: Mapping[str, Any]) -> str:
    """Both panels as one SVG that stands alone."""
    shades = " ".join(f"{name}: {value};" for name, value in SHADES.items())
    panels = [_panel(front, term) for term in AXES]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {HEIGHT}">'
        f"<style>svg {{ {shades} }}{DRAWN}</style>"
        f'<rect width="100%" height="100%" fill="#ffffff"/>{panels[0]}'
        f'<g transform="translate({WIDTH} 0)">{panels[1]}</g></svg>'
    )


def page(front: Mapping[str, Any]) -> str:
    """The whole page: panels, one trial in full, and the table; no other file and no host."""
    rows = ranked(front)
    shades = " ".join(f"{name}: {value};" for name, value in SHADES.items())
    panels = "".join(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" '
        f'aria-label="Quality over {escape(words)}">{_panel(front, term)}</svg>'
        for term, words in AXES.items()
    )
    words = {row["trial"]: _told(row, front) for row in rows}
    data = json.dumps(words).replace("<", "\\u003c")
    lines = [
        f'<tr data-trial="{row["trial"]}" class="{_kind(row, front)}">{_tags("td", _cells(row, front))}</tr>'
        for row in rows
    ]
    first = front["chosen"] or front.get("nearest") or (rows[0]["trial"] if rows else "")
    predicted = (front.get("predictor") or {}).get("words", "")
    predicted = f"Latency as predicted: {predicted}." if predicted else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>recray compress</title><style>:root {{ {shades} }}{DRAWN}{STYLE}</style></head>
<body data-first="{escape(first)}"><main>
<h1>{len(rows)} trials under {escape(limits(front))}</h1>
<p id="why">{escape(front["why"])}.</p>
<p class="soft">Green is chosen, blue nothing beats in quality, p99 and bytes at once, grey is beaten;
hollow is over the budget, which is the dashed line. {escape(predicted)}</p>
<p><label><input type="checkbox" id="dull"> hide what is beaten</label>
<label><input type="checkbox" id="over"> hide what is over the budget</label></p>
<div class="panels">{panels}</div>
<dl id="told" aria-live="polite"></dl>
<table><thead><tr>{_tags("th", _head(front))}</tr></thead><tbody>{"".join(lines)}</tbody></table>
</main><script type="application/json" id="trials">{data}</script><script>{SCRIPT}</script></body></html>
"""


def limits(front: Mapping[str, Any]) -> str:
    """The budget in words."""
    budget = front["budget"]
    told = f"p99 {milliseconds(budget['p99'])} and size {megabytes(budget['size'])}"
    told += f" and cost {money(budget['cost'])} per 1,000" if budget.get("cost") else ""
    return told + (f" at {budget['rps']:g} requests/s" if budget.get("rps") else "")


def _panel(front: Mapping[str, Any], term: str) -> str:
    """Quality over one term: grid, what the budget allows, a mark a trial."""
    good = [row for row in front["trials"] if not row["error"]]
    limit = front["budget"]["p99" if term == "p99" else "size"]
    x_of, x_ticks = _scale([row["metrics"][term] for row in good] + [limit], LEFT, WIDTH - RIGHT, log=True)
    y_of, y_ticks = _scale([row["metrics"][front["metric"]] for row in good], HEIGHT - BOTTOM, TOP)
    show = milliseconds if term == "p99" else megabytes
    floor, wall, edge = HEIGHT - BOTTOM, WIDTH - RIGHT, x_of(limit)
    xs, ys = [(x_of(tick), show(tick)) for tick in x_ticks], [(y_of(tick), f"{tick:g}") for tick in y_ticks]
    parts = [
        f'<rect x="{LEFT}" y="{TOP}" width="{edge - LEFT:.1f}" height="{floor - TOP}" fill="var(--wash)"/>',
        grid(xs, ys, left=LEFT, right=wall, top=TOP, bottom=floor),
    ]
    parts.append(
        f'<line class="budget" x1="{edge:.1f}" x2="{edge:.1f}" y1="{TOP - 8}" y2="{floor}" '
        f'stroke="var(--limit)" stroke-width="1.5" stroke-dasharray="5 4"/>'
        f'<text class="limit" x="{edge:.1f}" y="{TOP - 12}" text-anchor="{_anchor(edge)}">'
        f"budget {show(limit)}</text>"
        f'<text x="{wall}" y="{floor + 36}" text-anchor="end">{AXES[term]}</text>'
        f'<text x="6" y="{TOP - 12}">{escape(front["metric"])}</text>'
    )
    marks = sorted(good, key=lambda row: (row["trial"] == front["chosen"], not row["dominated"]))
    for row in marks:
        x, y = x_of(row["metrics"][term]), y_of(row["metrics"][front["metric"]])
        parts.append(
            f'<circle class="mark {_kind(row, front)}" data-trial="{row["trial"]}" tabindex="0" '
            f'role="button" aria-label="{escape(row["words"])}" cx="{x:.1f}" cy="{y:.1f}" r="6">'
            f"<title>{escape(row['words'])}</title></circle>"
        )
        name = {front["chosen"]: "chosen", front.get("reference"): "uncompressed"}.get(row["trial"])
        if name:
            parts.append(
                f'<text class="strong" x="{x:.1f}" y="{y - 11:.1f}" text-anchor="{_anchor(x)}">{name}</text>'
            )
    return "".join(parts)


def _scale(
    values: Sequence[float], start: float, end: float, *, log: bool = False
) -> tuple[Callable[[float], float], list[float]]:
    """(value -> place, round ticks) with some air; on the log scale ticks at 1, 2 and 5."""
    to = math.log10 if log else float
    low, high = (to(edge) for edge in (min(values, default=0.1), max(values, default=1.0)))
    air = 0.08 * (high - low) or 0.1
    low, high = low - air, high + air
    if log:
        powers = range(math.floor(low), math.ceil(high) + 1)
        ticks = [m * 10.0**p for p in powers for m in ((1, 2, 5) if high - low < 2 else (1,))]
        ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    else:
        ticks = round_ticks(low, high, False)
    return lambda value: start + (end - start) * (to(value) - low) / (high - low), ticks


def _told(row: Row, front: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All of one trial, as (term, words)."""
    told = [("trial", f"{row['number']} ({row['trial'][:12]})"), ("plan", row["words"])]
    if row["error"]:
        return [*told, ("failed", row["error"])]
    metrics, latency, cost = row["metrics"], row.get("latency") or {}, row.get("cost") or {}
    loss = row.get("relative_loss")
    told.append((front["metric"], f"{metrics[front['metric']]:.4f}" + (f" ({-loss:+.2%})" if loss else "")))
    between = ""
    if "low" in latency:
        http = front["budget"].get("http", 0.0)
        between = f" (95 %: {milliseconds(latency['low'] + http)} to {milliseconds(latency['high'] + http)})"
    told.append(("p50", milliseconds(metrics["p50"])))
    told.append(("p99", milliseconds(metrics["p99"]) + between))
    stages = (latency.get("stages") or {}).items()
    if stages:
        told.append(("of it", ", ".join(f"{name} {milliseconds(one['p50'])}" for name, one in stages)))
    told.append(("bytes", megabytes(metrics["bytes"])))
    if cost:
        told.append(("1,000 cost", f"{_bill(cost)} = requests x compute + storage"))
        if cost.get("delta"):
            told.append(("change of it", _bill(cost["delta"])))
    over = ", ".join(f"{name} by {share:.0%}" for name, share in row["over"].items())
    return [*told, ("budget", f"over: {over}" if over else "fits")]


def _bill(told: Mapping[str, float]) -> str:
    return f"{money(told['total'])} ({money(told['compute'])} + {money(told['storage'])})"


def _head(front: Mapping[str, Any]) -> list[str]:
    return ["trial", "plan", front["metric"], "p50", "p99", "bytes", "per 1,000", "change", "budget"]


def _cells(row: Row, front: Mapping[str, Any]) -> list[str]:
    if row["error"]:
        return [str(row["number"]), f"{row['words']}: {row['error']}", *[""] * 6, "failed"]
    metrics, cost = row["metrics"], row.get("cost") or {}
    delta = (cost.get("delta") or {}).get("total")
    said = "fits" if row["fits"] else f"over {' and '.join(row['over'])}"
    return [
        str(row["number"]),
        row["words"],
        f"{metrics[front['metric']]:.4f}",
        milliseconds(metrics["p50"]),
        milliseconds(metrics["p99"]),
        megabytes(metrics["bytes"]),
        money(cost["total"]) if cost else "",
        "" if delta is None else f"{delta:+.2g}",
        "chosen" if row["trial"] == front["chosen"] else said,
    ]


def _kind(row: Row, front: Mapping[str, Any]) -> str:
    if row["error"]:
        return "dull over"
    kind = "chosen" if row["trial"] == front["chosen"] else "dull" if row["dominated"] else "front"
    return kind if row["fits"] else f"{kind} over"


def _tags(tag: str, cells: Sequence[str]) -> str:
    return "".join(
        f"<{tag}{' class=word' if i == 1 else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells)
    )


def _anchor(x: float) -> str:
    """Words near the edges stay inside."""
    return "end" if x > WIDTH - 90 else "start" if x < LEFT + 60 else "middle"

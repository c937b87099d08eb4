"""The demonstration's report as one HTML page: a table, the Pareto picture as inline SVG, no other file.

`page` is a pure function of what `report.json` holds, so a page can be made again from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from recray.tuning.pareto import megabytes
from recray.tuning.picture import grid, round_ticks

Numbers = Mapping[str, Any]

WIDTH, HEIGHT = 860, 460  # of the picture, in its own units
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 28, 84  # its margins
LARGEST = 26.0  # radius of the largest bubble

STYLE = """
:root { --ink: #1b1f24; --soft: #5d6670; --line: #dde2e7; --paper: #ffffff; --best: #0b6e4f;
  --front: #2f6fb3; --dull: #b4bcc5; --limit: #b3452f; --wash: #f1f7f4; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f8; color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 940px; margin: 32px auto; padding: 36px 40px 28px; background: var(--paper);
  border: 1px solid var(--line); border-radius: 10px; }
h1 { margin: 0 0 4px; font-size: 26px; letter-spacing: -.015em; }
h2 { margin: 34px 0 8px; font-size: 16px; }
p { margin: 0 0 10px; } .soft, figcaption, footer { color: var(--soft); }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; font-size: 13px; color: var(--soft); border-bottom: 2px solid var(--ink); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td { white-space: nowrap; }
td.word, th.word { text-align: left; white-space: normal; }
td.word { font-size: 13px; } tr.ours td { background: var(--wash); font-weight: 600; }
tr.dull td { color: #8b949e; }
ul.checks { list-style: none; margin: 14px 0 0; padding: 0; }
ul.checks li { padding: 2px 0 2px 24px; position: relative; }
ul.checks li::before { content: "✓"; position: absolute; left: 2px; color: var(--best); font-weight: 700; }
ul.checks li.no::before { content: "✗"; color: var(--limit); }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: var(--soft); }
svg text.strong { fill: var(--ink); font-weight: 600; } svg text.limit { fill: var(--limit); }
figcaption { font-size: 13px; margin: 4px 0 14px; } table + p { margin-top: 8px; font-size: 13px; }
.bar { display: flex; height: 22px; border-radius: 5px; overflow: hidden; margin-bottom: 8px; }
.bar i { display: block; } .stages { font-size: 13px; color: var(--soft); }
.stages b { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin: 0 5px 0 0; }
.stages span { display: inline-block; margin-right: 16px; white-space: nowrap; }
footer { margin-top: 30px; padding-top: 12px; border-top: 1px solid var(--line); font-size: 12.5px; }
code { font: 12.5px ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
"""
SHADES = ("#0b6e4f", "#2f6fb3", "#7a5ea8", "#c08a2b", "#b3452f", "#4f8a8b", "#8b949e", "#a4547b", "#5d6670")


def page(report: Numbers) -> str:
    """The whole page, from what `report.json` holds."""
    world = report["world"]
    shape = (
        f"{world['users']:,} users, {world['items']:,} items and {world['interactions']:,} interactions "
        f"of a synthetic world; every number was measured in this run, {report['date']}."
    )
    checks = "".join(
        f'<li class="{"yes" if check["holds"] else "no"}">{escape(check["what"])}</li>'
        for check in report["checks"]
    )
    search = report["search"]
    versions = escape(", ".join(f"{name} {number}" for name, number in report["versions"].items()))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>recray demo</title><style>{STYLE}</style></head><body><main>
<h1>From an interaction log to an answer over HTTP</h1>
<p class="soft">{shape}</p>
<ul class="checks">{checks}</ul>
<h2>Quality, size and latency</h2>
{quality_table(report)}
<p class="soft">Full ranking of the catalogue for {report["quality"]["users"]:,} users, the last interaction
held out. Differences are paired by user, with their 95 % interval.</p>
<h2>What the search tried</h2>
<figure>{picture(search)}<figcaption>Each bubble is one way to pack the two models; its area is its bytes.
Up is better, left is faster. Grey ones are beaten by another in quality, p99 and bytes at once; a dashed
rim is over the size budget of {megabytes(search["budget"]["size"])}. Chosen:
{escape(search["why"])}.</figcaption></figure>
{trial_table(search)}
<h2>Where the time went</h2>
{stages(report["seconds"])}
<footer>{escape(report["hardware"]["cpu"])}, {report["hardware"]["cores"]} cores,
{report["hardware"]["memory_gib"]} GiB · {versions}<br>
<code>{escape(report["command"])}</code></footer>
</main></body></html>
"""


def quality_table(report: Numbers) -> str:
    """Baselines, the uncompressed and the served pipeline, line by line."""
    quality, http, size = report["quality"], report["http"], report["bytes"]
    rows = [
        ("Popularity", quality["popularity"], quality["differences"]["popularity"], None, None, ""),
        ("Item neighbours", quality["item-knn"], quality["differences"]["item-knn"], None, None, ""),
        (
            "Uncompressed",
            quality["uncompressed"],
            quality["differences"]["uncompressed"],
            size["before"],
            http["before"],
            "",
        ),
        ("Compressed, as served", quality["served"], None, size["after"], http["after"], "ours"),
    ]
    lines = []
    for name, ndcg, gain, count, asked, kind in rows:
        told = "" if gain is None else f"{gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]"
        cells = [
            f"{ndcg:.4f}",
            told or "–",
            "–" if count is None else megabytes(count),
            *(("–", "–") if not asked else (_ms(asked["p50_ms"]), _ms(asked["p99_ms"]))),
        ]
        lines.append(
            f'<tr class="{kind}"><td>{name}</td>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        )
    head = ("", "NDCG@10", "served is better by", "model bytes", "HTTP p50", "HTTP p99")
    return _table(head, lines)


def trial_table(search: Numbers) -> str:
    """Every trial in the order tried."""
    lines = []
    for trial in search["trials"]:
        kind = "ours" if trial["chosen"] else "dull" if trial["dominated"] or trial["error"] else ""
        if trial["error"]:
            cells = f'<td colspan="4" class="word">{escape(trial["error"])}</td>'
        else:
            fits = "chosen" if trial["chosen"] else "fits" if trial["fits"] else "over budget"
            cells = (
                f"<td>{trial['quality']:.4f}</td><td>{trial['p99_ms']:.2f} ms</td>"
                f"<td>{megabytes(trial['bytes'])}</td><td>{fits}</td>"
            )
        lines.append(
            f'<tr class="{kind}"><td>{trial["number"]}</td>'
            f'<td class="word">{escape(trial["words"])}</td>{cells}</tr>'
        )
    return _table(("", "plan", "NDCG@10", "p99", "bytes", ""), lines)


def stages(seconds: Mapping[str, float]) -> str:
    """One bar of all stages, and what each took."""
    total = sum(seconds.values())
    shades = [SHADES[i % len(SHADES)] for i in range(len(seconds))]
    bars = "".join(
        f'<i style="width:{100 * value / total:.2f}%;background:{shade}" title="{escape(name)}"></i>'
        for (name, value), shade in zip(seconds.items(), shades)
    )
    told = "".join(
        f'<span><b style="background:{shade}"></b>{escape(name)} {value:.1f} s</span>'
        for (name, value), shade in zip(seconds.items(), shades)
    )
    return f'<div class="bar">{bars}</div><div class="stages">{told}<span>together {total:.0f} s</span></div>'


def picture(search: Numbers) -> str:
    """The Pareto picture: quality over p99, area = bytes, the budget as lines."""
    good = [trial for trial in search["trials"] if not trial["error"]]
    limit = 1e3 * search["budget"]["p99"]
    slowest = [t["p99_ms"] for t in good]
    if limit < 2.5 * max(slowest, default=0.0):
        slowest.append(limit)  # the line of the budget is on the picture
    x_of, x_ticks = _axis(slowest, LEFT, WIDTH - RIGHT, zero=True)
    y_of, y_ticks = _axis([t["quality"] for t in good], HEIGHT - BOTTOM, TOP)
    most = max([search["budget"]["size"], *(t["bytes"] for t in good)])

    def radius(count: float) -> float:
        return max(4.0, LARGEST * math.sqrt(count / most))

    xs, ys = ([(of(tick), f"{tick:g}") for tick in ticks] for of, ticks in ((x_of, x_ticks), (y_of, y_ticks)))
    floor, wall = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        grid(xs, ys, left=LEFT, right=wall, top=TOP, bottom=floor),
        f'<text x="{wall}" y="{floor + 40}" text-anchor="end">p99 of one request in process, ms</text>'
        f'<text x="{LEFT - 56}" y="{TOP - 12}">NDCG@10 (validation)</text>',
    ]
    if LEFT <= x_of(limit) <= WIDTH - RIGHT:
        x = x_of(limit)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 12}" y2="{HEIGHT - BOTTOM}" '
            'stroke="var(--limit)" stroke-dasharray="5 4"/>'
            f'<text class="limit" x="{x - 6:.1f}" y="{TOP - 4}" text-anchor="end">'
            f"p99 budget {limit:g} ms</text>"
        )
    else:
        parts.append(
            f'<text class="limit" x="{WIDTH - RIGHT}" y="{TOP - 12}" text-anchor="end">'
            f"p99 budget {limit:g} ms lies further right →</text>"
        )
    rim = radius(search["budget"]["size"])
    parts.append(
        f'<circle cx="{LEFT + rim:.1f}" cy="{HEIGHT - LARGEST - 4:.1f}" r="{rim:.1f}" fill="none" '
        'stroke="var(--limit)" stroke-dasharray="5 4"/>'
        f'<text class="limit" x="{LEFT + 8 + 2 * rim:.1f}" y="{HEIGHT - LARGEST:.1f}">'
        f"size budget {megabytes(search['budget']['size'])}</text>"
    )
    edge: list[Numbers] = []  # those that nothing faster beats in quality
    for trial in sorted(good, key=lambda t: (t["p99_ms"], -t["quality"])):
        if not edge or trial["quality"] > edge[-1]["quality"]:
            edge.append(trial)
    if len(edge) > 1:
        path = " ".join(f"{x_of(t['p99_ms']):.1f},{y_of(t['quality']):.1f}" for t in edge)
        parts.append(f'<polyline points="{path}" fill="none" stroke="var(--front)" stroke-opacity=".35"/>')
    for trial in sorted(good, key=lambda t: (t["chosen"], not t["dominated"], -t["bytes"])):
        parts.append(
            _bubble(trial, x_of(trial["p99_ms"]), y_of(trial["quality"]), radius(trial["bytes"]), search)
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Quality against p99 of every trial">'
        + "".join(parts)
        + "</svg>"
    )


def _bubble(trial: Numbers, x: float, y: float, r: float, search: Numbers) -> str:
    shade = "best" if trial["chosen"] else "dull" if trial["dominated"] else "front"
    dashes = ' stroke-dasharray="4 3"' if trial["bytes"] > search["budget"]["size"] else ""
    told = f"{trial['words']}: {trial['quality']:.4f}, {trial['p99_ms']:.2f} ms, {megabytes(trial['bytes'])}"
    made = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" fill="var(--{shade})" '
        f'fill-opacity="{0.85 if trial["chosen"] else 0.28}" stroke="var(--{shade})"{dashes}>'
        f"<title>{escape(told)}</title></circle>"
    )
    if trial["chosen"]:
        at, anchor = (x - r - 6, "end") if x > WIDTH - 120 else (x + r + 6, "start")
        made += f'<text class="strong" x="{at:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">chosen</text>'
    elif trial["reference"]:
        made += (
            f'<text class="strong" x="{min(x, WIDTH - 70):.1f}" y="{y - r - 6:.1f}" '
            'text-anchor="middle">uncompressed</text>'
        )
    return made


def _axis(
    values: Sequence[float], start: float, end: float, *, zero: bool = False
) -> tuple[Any, list[float]]:
    """(value -> place on the picture, round ticks) with some air around the values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    air = 0.18 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = (0.0 if zero else low - air), high + air
    ticks = round_ticks(low, high, False)
    return lambda value: start + (end - start) * (value - low) / (high - low), ticks


def _table(head: Sequence[str], lines: Sequence[str]) -> str:
    titles = "".join(f"<th{' class=word' * (title == 'plan')}>{escape(title)}</th>" for title in head)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} ms"

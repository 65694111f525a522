"""A run as one HTML file that needs nothing else: figures for light and dark, and tables that scroll."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from html import escape
from pathlib import Path

from . import figures
from .results import Run
from .tables import CASE, Table, tables
from .timing import plural

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #1f2328; --soft: #57606a; --line: #d8dee4; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0d1117; --text: #e6edf3; --soft: #9198a1; --line: #2a313a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 900px; padding: 1rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { color: var(--soft); } ul { padding-left: 1.2rem; }
figure { margin: 1.5rem 0; } figure div { overflow-x: auto; }
img { display: block; width: 100%; min-width: 520px; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; max-height: 75vh;
  width: max-content; min-width: 100%; max-width: calc(100vw - 2rem); margin-left: 50%;
  transform: translateX(-50%); }
table { border-collapse: separate; border-spacing: 0; font-size: .8rem; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  background: var(--ground); }
thead th { position: sticky; top: 0; z-index: 1; }
th:first-child, td:first-child { position: sticky; left: 0; text-align: left; }
thead th:first-child { z-index: 2; }
tbody th { color: var(--soft); } tbody th span { position: sticky; left: .6rem; }
@media (max-width: 560px) { figcaption::before { content: "\\21C6  Swipe to see all of it. "; } }
"""


def save(run: Run, path: Path) -> None:
    path.write_text(render(run), encoding="utf-8")


def render(run: Run) -> str:
    """The page. Needs matplotlib for the figures."""
    machine = run.machine
    facts = [
        f"{machine['cpu']}, {machine['cpu_count']} CPUs, {plural(run.threads)}; "
        f"{', '.join(machine['isa']) or 'plain C'}",
        ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        f"Rates of the rungs: {machine['rates']}; offered to the planner: {', '.join(machine['offered'])}",
        f"Tolerance of the adaptive configurations: {run.tolerance:g}",
    ]
    if run.quick:
        facts.append("A quick run: few rounds and short heads, so times scatter")
    facts += [f"Left out: {name} ({why})" for name, why in run.left_out.items()]
    if run.broken:
        facts.append(f"{len(run.broken)} rows have an error above what was promised")
    parts = ["<h1>AdaAttn: benchmark of this machine</h1>", f"<p>{escape(run.date)}</p>"]
    parts.append("<ul>" + "".join(f"<li>{escape(fact)}</li>" for fact in facts) + "</ul>")
    parts += _figures(run)
    parts += [_table(one) for one in tables(run)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>AdaAttn benchmark, {escape(run.date[:10])}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _figures(run: Run) -> list[str]:
    images: dict[str, dict[str, str]] = defaultdict(dict)
    for name, theme, figure in figures.drawn(run):
        file = io.BytesIO()
        figures.write_svg(figure, theme, file)
        images[name][theme.name] = "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
    parts = []
    for name, themed in images.items():
        caption = escape(figures.FIGURES[name][0])
        parts.append(
            '<figure><div><picture><source media="(prefers-color-scheme: dark)" '
            f'srcset="{themed["dark"]}"><img src="{themed["light"]}" alt="{caption}"></picture></div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return parts


def _table(table: Table) -> str:
    """Of rows with a case, the case as a line of its own above its contenders."""
    header, lines = table.header, []
    if cased := header[:2] == CASE:
        header = header[2:]
    for row in table.rows:
        if cased and row[0]:
            lines.append(
                f'<tr><th colspan="{len(header)}"><span>{escape(", ".join(row[:2]))}</span></th></tr>'
            )
        cells = row[2:] if cased else row
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    names = "".join(f"<th>{escape(name)}</th>" for name in header)
    return (
        f"<h2>{escape(table.title)}</h2>\n"
        f'<div class="wide"><table><thead><tr>{names}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )

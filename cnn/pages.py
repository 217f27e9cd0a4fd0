"""HTML pages that are complete in themselves: no network, no script; light and dark, wide and narrow."""

import html
import math

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #5f6670; --page: #fcfcfb; --line: #d9dbde;
        --card: #f1f2f3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7e9; --dim: #a0a6ae; --page: #16181b; --line: #3a3e44; --card: #212429; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; color: var(--ink); background: var(--page);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC",
       "PingFang SC", "Microsoft YaHei", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .3rem 0; } .dim, figcaption small { color: var(--dim); }
.result { font-size: 2rem; line-height: 1.2; margin-top: .8rem; font-variant-numeric: tabular-nums; }
.row { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.wide { overflow-x: auto; min-width: 0; }
@media (max-width: 30rem) { table { font-size: .78rem !important; } th, td { padding-right: .45rem !important; } }
svg { max-width: 100%; height: auto; display: block; } .scroll svg { min-width: 50rem; }
svg text { font-family: inherit !important; }
pre, code { font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { background: var(--card); padding: .7rem; overflow-x: auto; border-radius: 6px; margin: .4rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line);
         white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
td:first-child { white-space: normal; min-width: 5rem; max-width: 16rem; }
thead th { color: var(--dim); font-weight: 500; }
.images { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(8.2rem, 1fr)); }
.small { grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)); gap: .5rem; }
figure { margin: 0; font-size: .85rem; line-height: 1.3; }
img { display: block; width: 96px; max-width: 100%; aspect-ratio: 1; object-fit: contain;
      image-rendering: pixelated; background: var(--card); margin-bottom: .2rem; }
.small img { width: 64px; }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .3rem; }
"""


def page(title: str, body: str) -> str:
    """A page with its title as the first heading; the body is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escaped(title)}</title>'
        f"<style>{STYLE}</style></head>\n"
        f"<body><h1>{escaped(title)}</h1>\n{body}\n</body></html>\n"
    )


def escaped(text: str) -> str:
    return html.escape(str(text))


def details(head: str, content: str) -> str:
    return f"<details><summary>{escaped(head)}</summary>{content}</details>"


def table(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table; cells are text, escaped here."""
    top = "".join(f"<th>{escaped(name)}</th>" for name in head)
    lines = [
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows
    ]
    top = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f"<table>{top}<tbody>{''.join(lines)}</tbody></table>"


def shown(value: float | None) -> str:
    """Four digits, whole numbers as they are, n/a where there is nothing."""
    if value is None or math.isnan(value):
        return "n/a"
    return (
        str(value) if isinstance(value, int) else f"{value:.4f}" if value > 1e-3 else f"{value:.3g}"
    )

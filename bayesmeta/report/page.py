"""HTML of a report by string templates. Every text that comes from outside is escaped here, and nowhere else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1b1b1b; --soft: #4a4a4a; --line: #c9c9c9; --link: #1a4f8b;
  --note: #f3f5f7; --warning: #fdf3ee; --good: #f1f8f1;
  --note-edge: #5b6b7b; --warning-edge: #b3420e; --good-edge: #2c6e31; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181b; --ink: #e8e8e8; --soft: #b4b8bd; --line: #464b52;
  --link: #8ab8f2; --note: #23272c; --warning: #35221a; --good: #1b2b1d;
  --note-edge: #8c9cac; --warning-edge: #e07b45; --good-edge: #66ab6c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; color: var(--ink); background: var(--ground);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.25rem 0 .25rem; }
p, ul { max-width: 44rem; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -999rem; }
.skip:focus { position: static; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; max-width: none; }
nav a { display: inline-block; padding: .3rem 0; }
.say { border-left: .35rem solid var(--note-edge); background: var(--note); padding: .5rem .9rem; margin: .75rem 0; }
.say.warning { border-color: var(--warning-edge); background: var(--warning); }
.say.good { border-color: var(--good-edge); background: var(--good); }
.say p { margin: .25rem 0; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll table { font-size: .93rem; } .scroll th, .scroll td { padding: .3rem .45rem; }
.scroll th:first-child { padding-left: 0; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .35rem; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; white-space: normal; overflow-wrap: normal; min-width: 7rem; }
.facts th, .facts td { text-align: left; white-space: normal; vertical-align: top; font-weight: normal; }
.facts th { color: var(--soft); min-width: 7rem; }
.first th, .first td { font-weight: 700; }
.grid { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: .5rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: .25rem; }
figcaption { color: var(--soft); font-size: .93rem; margin-top: .25rem; }
summary { color: var(--link); padding: .3rem 0; cursor: pointer; }
@media print { nav, .skip { display: none; } body { max-width: none; padding: 0; } .scroll { overflow: visible; }
  figure, tr, .say { break-inside: avoid; } h2, h3 { break-after: avoid; } }
footer { margin-top: 2.5rem; padding-top: .75rem; border-top: 1px solid var(--line); color: var(--soft); }
"""
# no script, no network: what the page does not need, the browser is told to refuse
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its heading and its HTML."""

    anchor: str
    heading: str
    body: str


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>\n"


def box(text: str, kind: str = "") -> str:
    """A remark that must be seen; ``kind`` is "warning", "good" or "" and is said in words too."""
    word = {"warning": "<strong>Warning.</strong> ", "good": "<strong>Good.</strong> "}.get(kind, "")
    return f'<div class="say {kind}"><p>{word}{escape(text)}</p></div>\n'


def heading(text: str) -> str:
    """A heading below that of a section."""
    return f"<h3>{escape(text)}</h3>\n"


def facts(caption: str, rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, in two columns."""
    body = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>\n' for k, v in rows)
    return f'<table class="facts"><caption>{escape(caption)}</caption><tbody>\n{body}</tbody></table>\n'


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, strong: bool = False) -> str:
    """A table of numbers; its first column names the rows. One that is too wide scrolls by itself.

    Args:
        caption: what it shows. columns: headings, the first that of the names.
        rows: texts. strong: whether the first row is set in bold.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = ""
    for place, (name, *cells) in enumerate(rows):
        mark = ' class="first"' if strong and place == 0 else ""
        body += f'<tr{mark}><th scope="row">{escape(name)}</th>'
        body += "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n"
    label = escape(f"Table: {caption}")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">\n<table><caption>{escape(caption)}'
        f"</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def details(summary: str, body: str) -> str:
    """HTML that is folded away until asked for."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>\n"


def figure(png: bytes, size: tuple[int, int], alt: str, caption: str) -> str:
    """A picture within the page; ``alt`` says what it shows to who cannot see it."""
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{size[0]}" height="{size[1]}" alt="{escape(alt)}">\n'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def grid(figures: Sequence[str]) -> str:
    """Pictures side by side where there is room."""
    return f'<div class="grid">\n{"".join(figures)}</div>\n'


def document(title: str, lead: str, sections: Sequence[Section], foot: str) -> str:
    """The whole page.

    Args:
        title: of the page. lead: HTML below it. sections: the parts. foot: plain text at the end.
    """
    links = "".join(f'<li><a href="#{escape(s.anchor)}">{escape(s.heading)}</a></li>\n' for s in sections)
    body = "".join(
        f'<section aria-labelledby="{escape(s.anchor)}">\n<h2 id="{escape(s.anchor)}">{escape(s.heading)}</h2>\n'
        f"{s.body}</section>\n"
        for s in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        '<a class="skip" href="#main">Skip to the content</a>\n'
        f"<header><h1>{escape(title)}</h1></header>\n"
        f'<nav aria-label="Contents"><ul>\n{links}</ul></nav>\n'
        f'<main id="main" tabindex="-1">\n{lead}{body}</main>\n<footer>{paragraph(foot)}</footer>\n</body>\n</html>\n'
    )

"""The report's page: self-contained HTML, readable without scripts, fit for paper and phones."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light; --ink: #1c2733; --soft: #5b6b7a; --line: #dfe5ea; --blue: #2166ac; --red: #b2182b; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p.sub { color: var(--soft); margin: 0 0 1.2rem; }
p.answer { font-size: 1.1rem; background: #f4f7fa; border-left: 4px solid var(--blue); padding: .9rem 1.1rem; margin: 1rem 0; }
p.alarm { border-left-color: var(--red); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.long { white-space: normal; min-width: 10rem; }
th { color: var(--soft); font-weight: 600; }
td.robust { color: var(--blue); font-weight: 600; } td.standard { color: var(--red); font-weight: 600; }
td.open, td.measured, td.interval { color: var(--soft); }
td.inside { color: #2d6a1f; font-weight: 600; } td.above, td.below { font-weight: 600; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; display: block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 0 1.5rem; }
figcaption code { font-size: .72rem; overflow-wrap: anywhere; }
figcaption { color: var(--soft); font-size: .86rem; margin-top: .35rem; }
pre { background: #f4f7fa; padding: .7rem .9rem; font-size: .78rem; line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


def escape(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text))


def heading(text: str, *, level: int = 2) -> str:
    """A heading, of a section unless `level` says 1."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, *, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def alarm(what: str, reasons: Sequence[str]) -> list[str]:
    """A paragraph that says why numbers must not be trusted, where there is a reason."""
    return [paragraph(f"{what}: " + "; ".join(reasons) + ".", kind="answer alarm")] if reasons else []


LONG = 32  # characters from which a cell is broken into lines


def _cell(text: str, *, marked: bool) -> str:
    kind = text if marked else "long" if len(text) > LONG else ""
    return f'<td class="{escape(kind)}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, marked: int | None = None) -> str:
    """A table; the cells of column `marked` carry their text as a class."""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = []
    for row in rows:
        cells = [_cell(cell, marked=column == marked) for column, cell in enumerate(row)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def picture(raw: bytes, *, caption: str, command: str = "") -> str:
    """A PNG or SVG figure, embedded, with its caption and the command that remakes it."""
    kind = "png" if raw.startswith(b"\x89PNG") else "svg+xml"
    source = f"data:image/{kind};base64,{base64.b64encode(raw).decode('ascii')}"
    text = escape(caption) + (f"<br><code>{escape(command)}</code>" if command else "")
    return f'<figure><img alt="{escape(caption)}" src="{source}"><figcaption>{text}</figcaption></figure>'


def code(text: str) -> str:
    """Shell lines."""
    return f"<pre>{escape(text)}</pre>"


def page(title: str, parts: Sequence[str]) -> bytes:
    """The whole page."""
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    ).encode()

"""One self-contained HTML page: tables and plots, no script, nothing loaded from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px;
       padding: 0 1rem; color: #1b1b1b; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 3px 9px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; }
.wide th:first-child, .wide td:first-child { position: sticky; left: 0; background: #fff; }
svg { width: 100%; max-width: 1000px; height: auto; }
"""
Shown = tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[str]]]


def page(title: str, sections: Sequence[Shown], plots: Mapping[str, str]) -> str:
    """`sections` are (heading, sentences, table header, table rows); `plots` SVG by heading, shown
    after the first section."""
    body = [f"<h1>{escape(title)}</h1>"]
    for index, section in enumerate(sections):
        body += _section(*section)
        if index == 0:
            for heading, svg in plots.items():
                body += [f"<h2>{escape(heading)}</h2>", svg[svg.index("<svg") :]]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _section(title: str, sentences, header, rows) -> list[str]:
    lines = [f"<h2>{escape(title)}</h2>"]
    if len(sentences) > 1:
        lines += ["<ul>", *(f"<li>{escape(sentence)}</li>" for sentence in sentences), "</ul>"]
    else:
        lines += [f"<p>{escape(sentence)}</p>" for sentence in sentences]
    if header:
        cells = "".join(f"<th>{escape(name)}</th>" for name in header)
        lines += ['<div class="wide"><table>', f"<thead><tr>{cells}</tr></thead>", "<tbody>"]
        for row in rows:
            lines.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
        lines.append("</tbody></table></div>")
    return lines

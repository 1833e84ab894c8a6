"""Figures, tables and pages as a person reads them; in files, their keys end in units."""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from display import engineering, percent, prefixed

from .estimate import GAINED, SPENT

QUANTITIES = {  # key: (what it is, its unit, one of the key's unit in that unit)
    "energy_pj": ("energy", "J", 1e-12),
    "delay_ns": ("delay", "s", 1e-9),
    "area_um2": ("area", "m²", 1e-12),
    "edp_pj_ns": ("EDP", "J·ms", 1e-18),
    "edap_pj_ns_um2": ("EDAP", "J·ms·mm²", 1e-24),  # as in millijoules, milliseconds, mm²
    "frames_per_second": ("frames a second", "/s", 1.0),
    "power_mw": ("power at that rate", "W", 1e-3),
    "leakage_mw": ("leakage in it", "W", 1e-3),
    "ops": ("operations", "", 1.0),
    "tops_per_watt": ("energy efficiency", "OPS/W", 1e12),
    "tops_per_mm2": ("area efficiency", "OPS/mm²", 1e12),
}
RATIOS = {key: name for name, key in SPENT.items()} | {name: name for name in GAINED}
RATIO_NAMES = {
    **{"edap": "EDAP", "energy": "energy", "delay": "delay", "area": "area"},
    **{"tops_per_watt": "TOPS/W", "tops_per_mm2": "TOPS/mm²"},
}


def shown(key: str, value: float, digits: int = 4) -> str:
    """A figure with the unit a person would choose: "11.18 µJ" for "energy_pj" and 11179416."""
    _, unit, one = QUANTITIES[key]
    if key == "frames_per_second" and value < 1:  # 0.8 /s, and not 800 m/s
        return f"{value:.{digits}g} {unit}"
    return engineering(value * one, unit, digits)


def mean_and_deviation(values: Sequence[float] | None) -> tuple[float | None, float | None]:
    """Of accuracies on a chip; None where there are none, no deviation of a single one."""
    if not values:
        return None, None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def on_chip_text(values: Sequence[float] | None) -> str:
    mean, deviation = mean_and_deviation(values)
    return "" if mean is None else spread_text(mean, deviation)


def spread_text(mean: float, deviation: float | None) -> str:
    """ "95.28 ± 0.83 %": of accuracies of several chips, or of one alone "95.28 %"."""
    return percent(mean, 2) if deviation is None else f"{100 * mean:.2f} ± {percent(deviation, 2)}"


def unit_of(key: str, value: float) -> tuple[float, str]:
    """(what to divide figures of this kind by, the unit they then have) for an axis whose largest
    one is `value`."""
    _, unit, one = QUANTITIES[key]
    size, name = prefixed(value * one, unit)
    return size / one, name


@dataclass(frozen=True)
class Section:
    """A heading, sentences, and a table where there is a header."""

    title: str
    sentences: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()


def options_section(title: str, options: Mapping[str, Any]) -> Section:
    """What chips are, by their options; of several values all."""

    def text(value: Any) -> Any:
        if isinstance(value, list):
            return ", ".join(str(text(x)) for x in value)
        return "ideal" if value is None else value

    rows = [[name, text(value)] for name, value in options.items() if value != ""]
    return Section(title, [], ["option", "value"], rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def csv_text(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = (
        [_cell(value).replace("\\", "\\\\").replace("|", "\\|") for value in line]
        for line in [header, ["---"] * len(header), *rows]
    )
    return [f"| {' | '.join(line)} |" for line in cells]


def markdown(title: str, sections: Iterable[Section]) -> str:
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        bullet = "- " if len(section.sentences) > 1 else ""
        lines += [bullet + sentence for sentence in section.sentences]
        lines += [""] if section.sentences else []
        if section.header:
            lines += [*markdown_table(section.header, section.rows), ""]
    return "\n".join(lines)


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


def page(title: str, sections: Iterable[Section], plots: Mapping[str, str]) -> str:
    """One self-contained HTML file: no script, nothing loaded from elsewhere. `plots` are SVG by
    heading, shown after the first section."""
    body = [f"<h1>{escape(title)}</h1>"]
    for index, section in enumerate(sections):
        body += _html(section)
        if index == 0:
            for number, (heading, svg) in enumerate(plots.items()):
                body += [f"<h2>{escape(heading)}</h2>", _ids_of_its_own(svg, number)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _ids_of_its_own(svg: str, number: int) -> str:
    """A picture as part of a page, where no id may stand twice."""
    for start in (' id="', "url(#", 'href="#'):
        svg = svg.replace(start, f"{start}{number}-")
    return svg[svg.index("<svg") :]


def _html(section: Section) -> list[str]:
    lines = [f"<h2>{escape(section.title)}</h2>"]
    tag = "li" if len(section.sentences) > 1 else "p"
    sentences = [f"<{tag}>{escape(sentence)}</{tag}>" for sentence in section.sentences]
    lines += ["<ul>", *sentences, "</ul>"] if tag == "li" else sentences
    if section.header:
        cells = "".join(f"<th>{escape(name)}</th>" for name in section.header)
        lines += ['<div class="wide"><table>', f"<thead><tr>{cells}</tr></thead>", "<tbody>"]
        for row in section.rows:
            lines.append(f"<tr>{''.join(f'<td>{escape(_cell(x))}</td>' for x in row)}</tr>")
        lines.append("</tbody></table></div>")
    return lines

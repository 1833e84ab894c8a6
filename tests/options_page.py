"""The tables of docs/options.md: `python tests/options_page.py` writes them anew.

An option's row is made of its declaration in settings.py. What stands there behind <br> is the
page's own, as are all other lines, and stays.
"""

import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from settings import OPTIONS, is_flag  # noqa: E402

PAGE = REPOSITORY / "docs" / "options.md"


def row(name: str, more: str) -> str:
    about = OPTIONS[name]
    default = about.default_text() or ("off" if is_flag(name) else "-")
    return f"| `--{name}` | {default} | {about.meaning()}{more} |"


def with_tables(text: str) -> str:
    """The page with a row for each option, in the table of its group."""
    groups: dict[str, list[str]] = {}
    for name, about in OPTIONS.items():
        groups.setdefault(about.group, []).append(name)
    lines, more, place, group = [], {}, {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            group = line[3:].lower()
        found = re.fullmatch(r"\| `--(\w+)` \| .*?(<br>.*)? \|", line)
        if group in groups and found is not None and found[1] in OPTIONS:
            more[found[1]] = found[2] or ""
            continue
        lines.append(line)
        if group in groups and line == "|---|---|---|":
            place[group] = len(lines)
    for group in reversed(groups):  # a table's rows move what is below
        lines[place[group] : place[group]] = [row(x, more.get(x, "")) for x in groups[group]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))

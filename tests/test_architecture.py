"""The drawing in docs/architecture.md is the house: nothing imports what stands above it."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs" / "architecture.md"


def floors() -> dict[str, int]:
    """Room -> its floor, counted from the top, of the first block of the page."""
    drawing = re.search(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    lines = [line for line in drawing.splitlines() if line.strip()]
    rooms = [re.findall(r"([a-z_]+)(?:\.py|/)", line) for line in lines]
    return {room: floor for floor, names in enumerate(rooms) for room in names}


def modules() -> dict[Path, str]:
    """Python file of the house -> its room."""
    folders = [x for x in REPOSITORY.iterdir() if (x / "__init__.py").is_file()]
    files = [*REPOSITORY.glob("*.py"), *(file for x in folders for file in x.rglob("*.py"))]
    paths = [file.relative_to(REPOSITORY) for file in files]
    return {path: path.parts[0].removesuffix(".py") for path in paths if path.parts[0] != "tests"}


def imported(file: Path) -> set[str]:
    """First names of all that a file imports, also inside its functions."""
    names = set()
    for node in ast.walk(ast.parse((REPOSITORY / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:  # else of its own room
            names.add(node.module.partition(".")[0])
    return names


def test_every_room_stands_in_the_drawing_and_no_other():
    assert set(modules().values()) == set(floors())


def test_nothing_imports_what_stands_above_or_beside_it():
    floor = floors()
    wrong = [
        f"{file} imports {name}"
        for file, room in modules().items()
        for name in sorted(imported(file) & floor.keys() - {room})
        if floor[name] <= floor[room]
    ]
    assert wrong == []

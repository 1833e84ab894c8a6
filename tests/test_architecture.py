"""The drawing in docs/architecture.md is the house: nothing imports what stands above it."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs" / "architecture.md"


def floors() -> dict[str, int]:
    """Room, or room/file that stands below the rest of its room -> its floor, counted from the top,
    of the first block of the page."""
    drawing = re.search(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    lines = [line for line in drawing.splitlines() if line.strip()]
    found = [re.findall(r"([a-z_]+/[a-z_]+)\.py|([a-z_]+)(?:\.py|/)", line) for line in lines]
    return {file or room: floor for floor, names in enumerate(found) for file, room in names}


def place_of(file: str, floor: dict[str, int]) -> str:
    """Where it stands in the drawing: "room/file", or the room."""
    return file if file in floor else file.partition("/")[0]


def modules() -> dict[Path, str]:
    """Python file of the house -> its place."""
    folders = [x for x in REPOSITORY.iterdir() if (x / "__init__.py").is_file()]
    files = [*REPOSITORY.glob("*.py"), *(file for x in folders for file in x.rglob("*.py"))]
    paths = [file.relative_to(REPOSITORY) for file in files]
    floor = floors()
    return {
        path: place_of(path.with_suffix("").as_posix(), floor)
        for path in paths
        if path.parts[0] != "tests"
    }


def imported(file: Path) -> set[str]:
    """All that a file imports, also inside its functions, as "room" or "room/file"."""
    names = set()
    for node in ast.walk(ast.parse((REPOSITORY / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            own = f"{file.parts[0]}." if node.level else ""
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            names |= {f"{own}{module}" for module in modules}
    return {"/".join(name.split(".")[:2]) for name in names}


def test_every_room_stands_in_the_drawing_and_no_other():
    assert set(modules().values()) == set(floors())


def test_nothing_imports_what_stands_above_or_beside_it():
    floor = floors()
    wrong = []
    for file, place in modules().items():
        for name in sorted({place_of(x, floor) for x in imported(file)} & floor.keys() - {place}):
            of_one_room = name.partition("/")[0] == file.parts[0]
            if floor[name] < floor[place] or (floor[name] == floor[place] and not of_one_room):
                wrong.append(f"{file} imports {name}")
    assert wrong == []

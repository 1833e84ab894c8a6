"""Every link, path, command and option that README and docs name is there.

Nothing is run: a command's arguments go through the parser that the command itself uses. A path in
`code` is a file of the repository; or it lies in a folder that .gitignore names, where commands
put what they make; or the program's code names each of its parts. Words in capitals, `*` and `…`
stand for anything.
"""

import argparse
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from textwrap import dedent

import pytest
from torch.distributed.run import get_args_parser

import options_page
from conftest import REPOSITORY
from load_settings import parse_settings
from runtime.errors import UserError
from settings import OPTIONS
from spikesim_eval.chip import Chip

MADE = re.findall(r"^/(\w+)/$", (REPOSITORY / ".gitignore").read_text(), re.MULTILINE)


def files_of_the_repository() -> list[Path]:
    """What git knows, and not what a user has put beside it; in a copy without git, all that no
    command has made."""
    git = ["git", "-C", str(REPOSITORY), "ls-files", "-z"]
    names = subprocess.run(git, capture_output=True, text=True).stdout.split("\0")[:-1]
    paths = [REPOSITORY / name for name in names] or [
        path
        for path in REPOSITORY.rglob("*")
        if not path.relative_to(REPOSITORY).parts[0].startswith((".", *MADE))
    ]
    return sorted(path for path in paths if path.is_file())


FILES = files_of_the_repository()
FOLDERS = {path.relative_to(REPOSITORY).parts[0] for path in FILES if path.parent != REPOSITORY}
PAGES = [path for path in FILES if path.suffix == ".md"]
SOURCES = [path for path in FILES if path.suffix in (".py", ".sh", ".toml", ".txt")]
ENDINGS = (".py", ".sh", ".md", ".csv", ".json", ".html", ".txt", ".pth", ".npz", ".zip", ".toml")
ENDINGS += (".png", ".pdf", ".svg", ".log")
OTHERS_OPTIONS = {"--signal", "--signals_to_handle"}  # of Slurm, of torchrun after torch 2.6
# What a page may start besides this project's programs and scripts.
TOOLS = {"cp", "git", "mkdir", "pip", "source", "tensorboard"}
SCRIPTS_PARSER = {"benchmarks/gpu.sh": "benchmarks.gpu", "scripts/edap_report.sh": "spikesim_eval"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda x: str(x.relative_to(REPOSITORY)))


def prose_and_blocks(page: Path) -> tuple[str, list[tuple[str, str]]]:
    """The text without its code blocks, and the blocks as (language, code)."""
    text, blocks = page.read_text(encoding="utf-8"), []
    for block in (r"^```(\w*)\n(.*?)^```$", r"(?:(?<=\n\n)|\A)()((?:    .*\n)+)"):
        found = re.compile(block, re.MULTILINE | re.DOTALL if "`" in block else 0)
        blocks += [(language, dedent(code)) for language, code in found.findall(text)]
        text = found.sub("", text)
    return text, blocks


def inline_code(page: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose_and_blocks(page)[0])]


def commands_of(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, without variables in front."""
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word == "&&" and words:
            yield words
            words = []
        elif word != "…" and (words or not re.match(r"[A-Z_]+=", word)):
            words.append(word)


class ParserFound(BaseException):
    """Raised in the place of parsing, so that the program stops there."""


def parser_used_by(start: Callable[[], object]) -> argparse.ArgumentParser:
    def stop(self: argparse.ArgumentParser, *_: object) -> None:
        raise ParserFound(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", ["program"])
        with pytest.raises(ParserFound) as found:
            start()
    return found.value.args[0]


@cache
def parser_of(module: str) -> argparse.ArgumentParser | None:
    """The parser of `python -m module`; None where the program has none."""
    if module == "main":
        return parser_used_by(lambda: parse_settings([]))
    if module == "torch.distributed.launch":
        return get_args_parser()
    path = REPOSITORY / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    assert path.is_file(), f"{module} does not exist"
    if "parse_args(" not in path.read_text():
        return None
    return parser_used_by(lambda: runpy.run_module(module, run_name="__main__"))


def check(words: list[str], complete: bool) -> None:
    """Fails where a command could not start: no such program, script or option; where `complete`,
    also where its parser refuses the arguments."""
    program, *arguments = words
    if program in TOOLS:
        return
    if program == "torchrun":
        parser = get_args_parser()
        if arguments[:1] == ["--signals_to_handle"] and "--signals_to_handle" not in (
            parser._option_string_actions
        ):
            return  # of a newer torch
    elif program == "python" and arguments[0] == "-m":
        parser = parser_of(arguments[1])
        arguments = arguments[2:]
    elif program == "python" and Path(arguments[0]).is_file():
        return  # the page shows it, and has a test of its own
    elif program == "python" and arguments[0].endswith(".py"):
        assert (REPOSITORY / arguments[0]).is_file(), f"{arguments[0]} does not exist"
        parser = parser_of(arguments[0].removesuffix(".py").replace("/", "."))
        arguments = arguments[1:]
    elif program in ("bash", "sbatch"):
        script, *arguments = arguments
        assert (REPOSITORY / script).is_file(), f"{script} does not exist"
        if script == "scripts/test.sh":
            assert arguments in ([], ["--all"])
            return
        parser = parser_of(SCRIPTS_PARSER.get(script, "main")) if arguments else None
        complete = complete and script == "benchmarks/gpu.sh"
    else:
        pytest.fail(f"what starts {' '.join(words)}?")
    launched = next((i for i, word in enumerate(arguments) if word == "main.py"), None)
    if launched is not None:
        check(["python", *arguments[launched:]], complete)
        arguments = arguments[: launched + 1]
    if parser is None:
        assert not complete or program != "python" or arguments[:1] != ["-"]
        return
    for word in arguments:
        if word.startswith("--"):
            assert word.partition("=")[0] in options_of(parser), f"{words}: no option {word}"
    if complete:
        try:
            parser.parse_args(arguments)
            if program == "python" and words[1] == "main.py":
                parse_settings(arguments)
        except UserError as error:  # the reader's files are not at hand
            if not re.search("does not exist|cannot read", str(error)):
                raise
        except SystemExit:
            assert arguments == ["--help"], words


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    names: set[str] = set()
    for action in parser._actions:
        names.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                names |= options_of(command)
    return names


@cache
def options() -> set[str]:
    """The names of all options of all programs here, and torchrun's."""
    parsers = map(
        parser_of, ("main", "torch.distributed.launch", "spikesim_eval", "experiments.study")
    )
    written = re.findall(r'"(--[a-z][\w-]*)"', code_text())
    return OTHERS_OPTIONS.union(written, *map(options_of, parsers))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose_and_blocks(page)[0], re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings]
    before = [slugs[:number].count(slug) for number, slug in enumerate(slugs)]
    return {f"{slug}-{n}" if n else slug for slug, n in zip(slugs, before, strict=True)}


@cache
def code_text() -> str:
    return "\n".join(path.read_text() for path in SOURCES if path.name != Path(__file__).name)


def looks_like_a_path(code: str) -> bool:
    return bool(
        re.fullmatch(r"[\w.*/…-]+", code)
        and ("/" in code.strip("/") or code.endswith("/") or code.endswith(ENDINGS))
        and not code.startswith("-")
    )


def is_there(path: str, page: Path) -> bool:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if any((folder / path).exists() for folder in (REPOSITORY, page.parent)):
        return True
    if parts[0] in MADE:
        return True
    ours = parts[0] in FOLDERS or path.endswith((".py", ".sh"))
    return not ours and all(
        piece in code_text()
        for part in parts
        for piece in re.split(r"(?<![a-z])[A-Z]+(?![a-z])|\*|…", part)
    )


@pages
def test_every_link_leads_to_a_file_and_a_heading_that_is_there(page):
    text, _ = prose_and_blocks(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), target
        assert other.is_relative_to(REPOSITORY), target
        if anchor:
            assert anchor in anchors(other), target


@pages
def test_every_path_is_one_of_the_repository_or_of_what_its_commands_make(page):
    for code in filter(looks_like_a_path, inline_code(page)):
        assert is_there(code, page), code


@pages
def test_every_command_is_one_that_its_own_parser_accepts(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what the reader has trained is not looked at
    for language, block in prose_and_blocks(page)[1]:
        if language == "python" and (name := re.match(r"# (\w+\.py)\n", block)):
            Path(name[1]).write_text(block)  # as the reader has done
        if language in ("", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                for words in commands_of(line):
                    check(words, complete="…" not in line)
    for code in inline_code(page):  # names a command, perhaps without all it needs
        if re.match(r"(python|bash|torchrun|sbatch) ", code):
            for words in commands_of(code):
                check(words, complete=False)


@pages
def test_every_option_in_the_text_is_one_of_a_program_here(page):
    for code in inline_code(page):
        if code.split()[0] not in (*TOOLS, "bash"):
            for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
                assert name in options(), code


@pages
def test_python_and_json_in_the_pages_can_be_read(page):
    for language, block in prose_and_blocks(page)[1]:
        if language == "python":
            compile(block, str(page), "exec")
            for module, names in re.findall(r"^from (\S+) import (.+)$", block, re.MULTILINE):
                for name in names.split(","):
                    assert hasattr(importlib.import_module(module), name.strip()), name
        if language == "json":
            json.loads(block)


def test_every_page_of_the_docs_can_be_reached_from_the_readme():
    links = re.findall(r"\]\((docs/\w+\.md)", (REPOSITORY / "README.md").read_text())
    pages = {str(page.relative_to(REPOSITORY)) for page in PAGES if page.parent.name == "docs"}
    assert pages - {"docs/layer_list.md"} <= set(links)


def test_the_page_of_the_code_names_every_file_of_the_program():
    named = set(inline_code(REPOSITORY / "docs/architecture.md"))
    for path in SOURCES:
        name = str(path.relative_to(REPOSITORY))
        if path.suffix == ".py" and not name.startswith(("tests/", "benchmarks/")):
            assert name in named or path.name == "__init__.py", name


def rows_of_options(page: str) -> list[tuple[str, str, str, str]]:
    """Of a page of docs: (heading, option, default, meaning) of each row that explains one."""
    rows, heading = [], ""
    for line in (REPOSITORY / "docs" / page).read_text().splitlines():
        if line.startswith("## "):
            heading = line[3:]
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `--") and len(cells) == 3:
            rows += [(heading, name, *cells[1:]) for name in re.findall(r"`(--\w+)", cells[0])]
    return rows


def test_the_tables_of_options_are_those_of_the_declarations():
    text = options_page.PAGE.read_text()
    assert options_page.with_tables(text) == text, "python tests/options_page.py writes them"
    assert all(f"\n| `--{name}` | " in text for name in OPTIONS)


def default_in(action: argparse.Action) -> str:
    """What the help of an option says, as the tables have it."""
    said = re.search(r"\(default (.+)\)$", action.help)
    return said[1] if said else "off" if action.nargs in (0, "?") else "-"


def test_the_page_of_hardware_says_the_defaults_choices_and_limits_of_help():
    (commands,) = (x.choices for x in parser_of("spikesim_eval")._actions if x.choices)
    rows = rows_of_options("hardware.md")
    for heading, name, default, meaning in rows:
        command = commands["nonideal" if "not ideal" in heading else "report"]
        (action,) = (x for x in command._actions if name in x.option_strings)
        assert default.strip("`") == default_in(action), name
        for choice in action.choices or ():
            assert f"`{choice}`" in default + meaning, (name, choice)
        for limits in re.findall(r"\d+ to \d+", meaning):
            assert limits in action.help, name
    chip = [f"--{name}" for name in vars(Chip())]
    assert sorted(chip) == sorted(row[1] for row in rows if row[0] == "Options of a chip")


def test_no_file_sends_a_reader_to_what_is_not_in_the_repository():
    elsewhere = re.compile(
        r"DESIG[N]|FACT[S]\.md|STYL[E]\.md|\.\./share[d]|[ `(]/wor[k]/|issu[e] \d"
    )
    for path in [*SOURCES, *PAGES]:
        found = elsewhere.search(path.read_text(encoding="utf-8"))
        assert found is None, (path, found)

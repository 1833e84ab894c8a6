"""An installation: what it holds, its commands, and the page of it."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from conftest import DIGITS, REPOSITORY
from exchange.__main__ import FORMATS
from exchange.read_integers import load

NOT_INSTALLED = {"tests", "benchmarks"}
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PAGE = (REPOSITORY / "docs" / "python.md").read_text()


def test_every_module_and_file_of_the_program_is_installed():
    tools = PROJECT["tool"]["setuptools"]
    assert tools["py-modules"] == sorted(path.stem for path in REPOSITORY.glob("*.py"))
    packages = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    assert tools["packages"] == sorted(packages - NOT_INSTALLED)
    assert not [x for name in packages - NOT_INSTALLED for x in REPOSITORY.glob(f"{name}/*/*.py")]
    for name in packages - NOT_INSTALLED:
        patterns = tools["package-data"].get(name, [])
        data = {x for pattern in patterns for x in (REPOSITORY / name).glob(pattern)}
        others = {x for x in (REPOSITORY / name).rglob("*") if x.is_file()}
        others = {x for x in others if x.suffix != ".py" and "__pycache__" not in x.parts}
        assert others == data


def test_every_command_is_a_function_and_the_page_names_it():
    commands = PROJECT["project"]["scripts"]
    for name, place in commands.items():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        file = "-m spikesim_eval" if "spikesim" in module else f"-m {module.split('.__')[0]}"
        file = f"{module}.py" if (REPOSITORY / f"{module}.py").exists() else file
        assert f"| `{name}` | `python {file}`: " in PAGE
    assert set(re.findall(r"^\| `(md-snn[\w-]*)`", PAGE, re.MULTILINE)) == set(commands)


def test_the_extras_are_what_messages_ask_for():
    extras = PROJECT["project"]["optional-dependencies"]
    assert {name for form in FORMATS.values() for name in form.packages} == set(extras["exports"])
    assert extras["events"] == ["aedat"]


def test_what_setuptools_installs_works_in_another_folder(clone, tmp_path):
    """Without pip, which would ask a network for setuptools."""
    source = Path(shutil.copytree(clone, tmp_path / "source"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = "from setuptools import setup; setup()"
    installed = tmp_path / "installed"
    command = [sys.executable, "-c", build, "-q", "build_py", "--build-lib", str(installed)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    shutil.rmtree(source)
    (tmp_path / "elsewhere").mkdir()

    names = [place.partition(":")[0] for place in PROJECT["project"]["scripts"].values()]
    train = [*DIGITS, "--paper_setting", "original", "--save_path", "run"]
    estimate = ["report", "--checkpoint", "run/original-best.pth", "--out", "report"]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += f"import main, spikesim_eval.__main__ as hardware; assert main.main({train}) == 0\n"
    code += f"hardware.main({estimate}); sys.argv[1:] = ['--help']; main.command()"
    how = {"cwd": tmp_path / "elsewhere", "capture_output": True, "text": True}
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, **how)
    assert done.returncode == 0, done.stderr[-2000:]
    for text in ("best accuracy", "report.html", "--paper_setting"):
        assert text in done.stdout


def test_the_page_s_lines_work_as_they_stand(trained, monkeypatch, capsys):
    """On another network, which the tests have trained."""
    checkpoint = str(trained["qamd"])
    lines = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    assert lines.count('"runs/quickstart/mdsnn/qamd-best.pth"') == 3
    lines = lines.replace("runs/quickstart/mdsnn/qamd-best.pth", checkpoint)
    digits = torch.from_numpy(load_digits().images[:5]) * 255 / 16
    images = torch.nn.functional.interpolate(digits[:, None], (16, 16)).round().to(torch.uint8)
    found = {"images": images}
    exec(lines, found)
    said = capsys.readouterr().out.splitlines()
    network, membranes = found["network"], found["membranes"]
    assert said[0] == f"{[str(k) for k in range(10)]} (1, 16, 16) 4"
    assert len(said[1].split(", ")) == 5
    assert found["shares"].shape == (5, 10)
    assert torch.allclose(found["shares"], found["logits"].softmax(1), atol=1e-6)
    assert {(u.shape[0], u.shape[1]) for u in membranes} == {(4, 5)}
    assert said[2] == str([tuple(u.shape) for u in membranes])
    accuracy, energy = map(float, said[3].split(" "))
    assert 0 < accuracy <= 1
    assert energy > 0
    file = Path(checkpoint).with_name("integers.npz")
    file.write_bytes(found["content"])
    assert load(file)
    assert np.isfinite(network.predict(images).numpy()).all()

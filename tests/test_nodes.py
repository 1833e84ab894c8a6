"""Two nodes, each with its torchrun: here two agents that meet on the loopback device."""

import socket
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY
from stand_in_data import write_tiny_imagenet

ORIGINAL = ["--paper_setting", "original", "--width", "2", "--epochs", "1", "--workers", "0"]
OPTIONS = [*ORIGINAL, "--deterministic", "--device", "cpu", "--save_path", "run"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def environment(shell_environment) -> dict[str, str]:
    # torchrun sets this where it starts several processes only; sums depend on it in the last bit.
    return shell_environment | {"OMP_NUM_THREADS": "1"}


def run_on_two_nodes(
    folders: list[Path], environment: dict[str, str], *options: str
) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each node. The first address in order gets RANK 0."""
    for folder in folders:
        folder.mkdir(exist_ok=True)
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test"]
    meeting.append(f"--rdzv_endpoint=127.0.0.1:{free_port()}")
    main = [str(REPOSITORY / "main.py"), *OPTIONS, *options]
    nodes = [
        subprocess.Popen(
            ["torchrun", *meeting, f"--local_addr={address}", *main],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for folder, address in zip(folders, ("127.0.0.1", "127.0.0.2"), strict=True)
    ]
    try:
        outputs = [node.communicate(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, *output) for node, output in zip(nodes, outputs, strict=True)]


def test_two_nodes_train_what_two_processes_of_one_node_train(tmp_path, environment):
    folders = [tmp_path / "node-0", tmp_path / "node-1"]
    (first, second) = run_on_two_nodes(folders, environment, "--data", "digits")
    assert (first[0], second[0]) == (0, 0), first[2][-2000:] + second[2][-2000:]
    assert "best accuracy" in first[1]
    assert second[1] == ""
    assert list(folders[1].iterdir()) == []

    one_node = ["torchrun", "--standalone", "--nproc_per_node=2", str(REPOSITORY / "main.py")]
    subprocess.run(
        [*one_node, *OPTIONS, "--data", "digits"],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
    )
    expected, found = tmp_path / "run", folders[0] / "run"
    assert (found / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()
    models = [
        torch.load(folder / "original-last.pth", weights_only=True)["model"]
        for folder in (expected, found)
    ]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_node_without_the_data_says_so(tmp_path, environment):
    folders = [tmp_path / "node-0", tmp_path / "node-1"]
    folders[0].mkdir()
    write_tiny_imagenet(folders[0], classes=2, per_class=4, val_per_class=2)
    options = ["--data", "TinyImagenet", "--data_path", ".", "--batch_size", "4"]
    (first, second) = run_on_two_nodes(folders, environment, *options)
    assert first[0] != 0
    assert second[0] != 0
    lines = second[2].splitlines()
    complaints = [line for line in lines if "main.py: error:" in line]
    assert complaints == [lines[-1]] * 2  # the second time after torchrun's own lines
    assert "tiny-imagenet-200" in complaints[0]

"""Two nodes, each with its torchrun: here two agents that meet on the loopback device, started by
scripts/slurm_example.sh with stand-ins for Slurm's commands, or by hand."""

import json
import os
import socket
import subprocess

import torch

from conftest import DIGITS, REPOSITORY, write_programs
from stand_in_data import write_tiny_imagenet
from warm import Program, launched

SCONTROL = """\
[[ "$*" == "show hostnames node[1-2]" ]] || exit 1
printf '%s\\n' 127.0.0.1 127.0.0.2
"""
SRUN = """\
[[ $1 == --kill-on-bad-exit=1 && $SRUN_CPUS_PER_TASK == 2 ]] || exit 1
"${@:2}" & first=$!    # the same command on both nodes
"${@:2}" & second=$!
wait $first && wait $second
"""
# torchrun sets this where it starts several processes only; sums depend on it in the last bit.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def job_with_a_free_port() -> int:
    for job in range(100, 10000):
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", 20000 + job)) != 0:
                return job
    raise OSError("no free port")


def test_the_slurm_example_trains_on_two_nodes_what_two_processes_of_one_node_train(
    clone, tmp_path, shell_environment
):
    script = REPOSITORY / "scripts" / "slurm_example.sh"
    lines = script.read_text().splitlines()
    sbatch = [n for n, line in enumerate(lines) if line.startswith("#SBATCH ")]
    commands = [n for n, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(sbatch) < min(commands)  # Slurm does not read on
    write_programs(tmp_path, scontrol=SCONTROL, srun=SRUN)
    job = job_with_a_free_port()
    of_slurm = {
        "SLURM_SUBMIT_DIR": str(clone),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": str(job),
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "PATH": f"{tmp_path}:{shell_environment['PATH']}",
    }
    small = [*DIGITS, "--device", "cpu", "--deterministic"]
    environment = shell_environment | of_slurm | ONE_THREAD
    how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    one_node = [*small, "--paper_setting", "original", "--seed", "1234", "--save_path", "one_node"]
    for result in (
        subprocess.run(["bash", script, *small], timeout=120, **how),
        launched(2, clone / "main.py", *one_node, cwd=clone),
    ):
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.count("best accuracy") == 1
    found, expected = clone / "checkpoints" / f"slurm-{job}", clone / "one_node"
    assert json.loads((found / "settings.json").read_text())["world_size"] == 2
    assert (found / "original-best.pth").is_file()
    assert (found / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()
    one, two = (
        torch.load(folder / "original-last.pth", weights_only=True)["model"]
        for folder in (expected, found)
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_node_without_the_data_says_so(tmp_path):
    folders = [tmp_path / "node-0", tmp_path / "node-1"]
    for folder in folders:
        folder.mkdir()
    write_tiny_imagenet(folders[0], classes=2, per_class=4, val_per_class=2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    options = ["--data", "TinyImagenet", "--data_path", ".", "--paper_setting", "original"]
    options += ["--width", "2", "--device", "cpu", "--batch_size", "4", "--save_path", "run"]
    nodes = [
        Program(
            REPOSITORY / "main.py",
            *options,
            cwd=folder,
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": "0"},
        )
        for rank, folder in enumerate(folders)
    ]
    try:
        _, (out, err) = (node.communicate(timeout=120) for node in nodes)
    finally:
        for node in nodes:
            node.kill()
    assert all(node.returncode != 0 for node in nodes)
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("main.py: error:")
    assert "tiny-imagenet-200" in line
    assert list(folders[1].iterdir()) == []

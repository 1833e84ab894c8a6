"""scripts/slurm_example.sh with stand-ins for Slurm's commands, which start real training."""

import json
import socket
import subprocess
from pathlib import Path

from conftest import DIGITS, REPOSITORY, write_programs

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
SMALL = [*DIGITS, "--device", "cpu"]


def job_with_a_free_port() -> int:
    for job in range(100, 10000):
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", 20000 + job)) != 0:
                return job
    raise OSError("no free port")


def test_the_slurm_example_trains_on_two_nodes(clone, tmp_path, shell_environment):
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
    command, how = ["bash", str(script), *SMALL], {"capture_output": True, "text": True}
    environment = shell_environment | of_slurm
    result = subprocess.run(command, cwd=tmp_path, env=environment, timeout=120, **how)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("best accuracy") == 1
    run = Path(clone, "checkpoints", f"slurm-{job}")
    assert json.loads((run / "settings.json").read_text())["world_size"] == 2
    assert (run / "original-best.pth").is_file()

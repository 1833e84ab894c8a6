"""A study as jobs of a Slurm cluster: teachers, then students, then the table."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.plan import Planned
from experiments.run_plan import HERE, write_run

# A task that comes near its time limit is told to save itself, and put into the queue again; so is
# one whose node fails. scancel ends it for good.
ARRAY = """\
#!/usr/bin/env bash
# Written by experiments.study --slurm. To change: the lines below for your cluster, or give
# submit.sh the options of sbatch.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={folder}/{part}-%a.txt
set -uo pipefail
cd "$SLURM_SUBMIT_DIR"
export PATH={bin}:"$PATH" PYTHONPATH={here}${{PYTHONPATH:+:$PYTHONPATH}}
export SRUN_CPUS_PER_TASK=${{SLURM_CPUS_PER_TASK:-1}}
export OMP_NUM_THREADS=$SRUN_CPUS_PER_TASK
runs=(
{runs}
)
run=${{runs[SLURM_ARRAY_TASK_ID]}}

limit=
trap 'limit=near; kill -TERM "$step"' USR1
srun --ntasks=1 python -m experiments.one_run "$run" >> "$run/log.txt" 2>&1 & step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done  # a signal ends wait only
if [[ $limit && $code != 0 ]]; then
    echo "near its time limit: it goes on in another job"
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""
TABLE = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --time=1:00:00
#SBATCH --output={folder}/table.txt
cd "$SLURM_SUBMIT_DIR"
export PATH={bin}:"$PATH" PYTHONPATH={here}${{PYTHONPATH:+:$PYTHONPATH}}
{command}
"""
SUBMIT = """\
#!/usr/bin/env bash
# bash {folder}/submit.sh [options of sbatch]
set -euo pipefail
cd {current}
after=
submit() {{
    local job
    job=$(sbatch --parsable ${{after:+"--dependency=afterany:$after"}} "${{@:2}}" {folder}/"$1")
    after=${{job%%;*}}
    echo "$1: job $after"
}}
"""


def write_jobs(todo: Sequence[Planned], runs: Path, command: Sequence[str]) -> Path:
    """Write the jobs into runs/slurm; the path of what submits them. `command` takes the rows of
    what is finished and writes the tables."""
    folder, name = runs / "slurm", runs.name
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"folder": folder, "here": HERE, "bin": os.path.dirname(sys.executable)}
    where = {name: shlex.quote(str(path)) for name, path in paths.items()}
    submit = SUBMIT.format(folder=where["folder"], current=shlex.quote(os.getcwd()))
    for part, members in (
        ("teachers", [planned for planned in todo if planned.teacher is None]),
        ("students", [planned for planned in todo if planned.teacher is not None]),
    ):
        if not members:
            continue
        for planned in members:
            write_run(planned, runs)
        # Within the script: Slurm keeps it as it was submitted, whatever is written here later.
        folders = "\n".join(shlex.quote(str(planned.folder(runs))) for planned in members)
        about = {"name": f"{name}-{part}", "part": part, "last": len(members) - 1, "runs": folders}
        (folder / f"{part}.sh").write_text(ARRAY.format(**where, **about))
        submit += f'submit {part}.sh "$@"\n'
    command = " ".join(map(shlex.quote, command))
    table = TABLE.format(name=f"{name}-table", command=command, **where)
    (folder / "table.sh").write_text(table)
    path = folder / "submit.sh"
    path.write_text(submit + 'submit table.sh "$@"\n')
    for script in folder.glob("*.sh"):
        os.chmod(script, 0o755)
    return path

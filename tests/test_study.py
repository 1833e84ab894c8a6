"""experiments.study and experiments.timesteps: real runs on stand-ins of images and of
events, and what becomes of their rows."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from matplotlib.colors import same_color

import main
import stand_in_data
from checkpoints import load_checkpoint
from conftest import DIGITS, REPOSITORY, evaluated, read_csv, write_programs
from display import COLOURS
from engine.log import git_commit
from experiments import one_run, rows, run_plan, study, study_table, timesteps
from experiments.plan import OWN, Planned, telling
from experiments.slurm import write_jobs
from runtime.errors import UserError
from settings import OPTIONS

TINY = ["--width", "1", "--epochs", "1", "--workers", "0", "--device", "cpu"]
OTHER_VALUES = (  # than the defaults
    "val_share=0.1 model_depth=34 width=2 time_window=2 bits=3 bn_bits=9 alpha=2 beta=7 tau=2 "
    "beta_schedule=constant epochs=99 batch_size=32 accumulate=2 lr=0.2 warmup=1 weight_decay=0 "
    "clip_grad=2 label_smoothing=0.1 augment=none seed=8 device=cpu amp= compile= deterministic= "
    "arch=vgg9 leak=0.5 threshold=0.7 reset=soft surrogate=atan surrogate_width=0.7 "
    "teacher_epochs=3 teacher_lr=0.3 teacher_seed=5"
)
FORMATS = ["CIFAR10", "ncaltech101"]


def run(arguments: list[str], capfd) -> tuple[int, str, str]:
    capfd.readouterr()
    code = study.main(arguments)
    return code, *capfd.readouterr()


def planned(arguments: list[str], runs: Path, module=study) -> list:
    parser = {study: study.study_parser, timesteps: timesteps.timesteps_parser}[module]()
    return module.planned_runs(parser.parse_args(["--data", "digits", *arguments]), runs)


def distilled(options: list[str], runs: Path) -> Planned:
    (run,) = (x for x in planned([*options, "--methods", "CLK"], runs) if x.method == "CLK")
    return run


def options_of(runs: list) -> list[tuple]:
    """What a person calls each: its method, start, seed and teacher's seed."""
    return [
        (x.method, x.start, x.settings.seed, x.teacher and x.teacher.settings.seed) for x in runs
    ]


ON_CHIP = {"crossbar": "spikesim-65nm"}
OF_CHIP = {  # beside it
    **{"xbar_size": "32", "cell_bits": "2", "columns": "offset", "crossbars_per_pe": "4"},
    **{"adc_bits": "6", "layer_adc_bits": "linear=7", "adc_of": "pe", "adc_range": "full"},
    **{"on_off_ratio": "10", "sigma": "0.1", "level_conductances": "0,0.4,1"},
    **{"programming": "0.1", "stuck_on": "0.01", "stuck_off": "0.01", "read_noise": "0.1"},
    **{"read_floor": "0.01"},
}

# The plan.


def test_teachers_come_before_their_students_and_all_of_a_seed_before_the_next(tmp_path):
    runs = planned(["--methods", "student", "CLK", "--starts", "scratch", "teacher"], tmp_path)
    of_seed = [(method, start) for start in ("scratch", "teacher") for method in ("student", "CLK")]
    expected = []
    for seed in (1, 2, 3):
        expected.append(("teacher", "scratch", seed, None))
        expected += [(method, start, seed, seed) for method, start in of_seed]
    assert options_of(runs) == expected


def test_every_option_of_main_is_one_of_the_study_or_the_study_s_own():
    known = study.study_parser()._option_string_actions
    assert {name for name in OPTIONS if f"--{name}" not in known} <= OWN
    for name in ("beta", "lr", "val_share", "augment", "compile", "data_path"):
        assert f"--{name}" in known


def test_an_option_goes_to_the_runs_in_which_it_has_a_meaning_and_its_values_are_a_grid(tmp_path):
    options = ["--seeds", "1", "--beta", "5", "20", "--lr", "0.05", "--teacher_epochs", "20"]
    runs = planned([*options, "--epochs", "15"], tmp_path)
    assert [(x.method, x.settings.beta) for x in runs] == [
        *(("teacher", None), ("student", None), ("CL", 0.0), ("CLM", 5), ("CLK", 5)),
        *(("CLM", 20), ("CLK", 20)),
    ]
    assert {x.settings.lr for x in runs} == {0.05}
    assert [x.settings.epochs for x in runs] == [20, *[15] * 6]
    assert {x.teacher for x in runs[1:]} == {runs[0]}


def test_no_two_runs_share_a_folder_whatever_they_differ_in(tmp_path):
    """Of every option of main.py that a study takes, with a value that is no default."""
    others = dict(word.partition("=")[::2] for word in OTHER_VALUES.split())
    others["data_path"] = str(tmp_path)
    taken = {x for x in OPTIONS if x not in OWN} - {"data", "image_size", "fold"}
    taken -= {"init_from"}  # a file
    taken -= {"sensor", "split_by"}  # of events
    taken -= ON_CHIP.keys() | OF_CHIP.keys() | {"after"}  # of a technology that drifts
    assert taken - set(others) == {"cache_path", "workers", "save_every", "check_numerics"}
    base = {"seed": "1", "bits": "4"}
    studies = [base] + [base | {name: value} for name, value in others.items()]
    studies += [base | ON_CHIP] + [base | ON_CHIP | {name: x} for name, x in OF_CHIP.items()]
    found: dict[str, tuple] = {}
    for options in studies:
        words = [word for name, x in options.items() for word in (f"--{name}", x) if word]
        run = distilled(words, tmp_path)
        for one in (run, run.teacher):
            assert found.setdefault(one.name, one.identity) == one.identity
    students = [name for name in found if "CLK" in name]
    assert len(students) == len(studies)
    plain, given = (distilled(["--seed", "1", *lr], tmp_path) for lr in ([], ["--lr", "0.1"]))
    assert plain.identity == given.identity  # a default that is given is the default


def test_an_option_of_a_later_version_leaves_the_runs_of_this_one_what_they_are(tmp_path):
    (run, *_) = planned(["--seeds", "1"], tmp_path)
    words = dict(word.split("=", 1) for word in telling(run.settings).split())
    assert words["lr"] == "0.1"
    assert "label_smoothing" not in words  # which is newer than the first checkpoints


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--width", "x"], "argument --width: invalid int value: 'x'"),
        (["--bits", "9"], "--bits must be between 2 and 8, got 9"),
        (["--lr", "-1"], "--lr must be between 0 and"),
        (["--methods", "CLX"], "did you mean CL"),
        (["--betta", "3"], "did you mean --beta?"),
        (["--methods", "student", "--beta", "3"], "--beta has a meaning in none of these runs"),
        (["--teacher_bits", "3"], "unrecognized arguments"),
        (["--teacher_width", "2", "--width", "1"], "trained with --width 2"),
        (["--loss", "CLK"], "unrecognized arguments: --loss"),
        (["--save_path", "x"], "unrecognized arguments: --save_path"),
        (["--workers", "0", "1"], "--workers changes no number"),
        (["--parallel", "0"], "--parallel must be 1 or more"),
        (["--gpus", "1"], "--gpus 1: this machine shows 0"),
        (["--name", "../x"], "make a name"),
        (["--runs", "/dev/null"], "choose another --runs"),
        (["--results", "/dev/null"], "choose another --results"),
        (["--data", "folder", "--data_path", "nowhere"], "--data folder expects"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(
    options, expected, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(["--data", "digits", *options], capfd)
    assert code == 2
    assert err.startswith("experiments.study: error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_gpus_and_cores_are_shared_out_unless_the_user_has_done_so(monkeypatch):
    def places(parallel: int | None, gpus: int | None, name: str) -> list[str]:
        return [place[name] for place in run_plan.places(parallel, gpus)]

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert places(None, 2, "CUDA_VISIBLE_DEVICES") == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,6,7")
    assert places(None, 3, "CUDA_VISIBLE_DEVICES") == ["2", "5", "6"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert places(3, None, "OMP_NUM_THREADS") == ["2"] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert places(3, None, "OMP_NUM_THREADS") == ["5"] * 3


# Real runs.


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Where a study of both data sets has run, and what it has said."""
    folder = tmp_path_factory.mktemp("both")
    data = folder / "data"
    stand_in_data.write_cifar(data, "CIFAR10", train=64, test=16)
    stand_in_data.write_ncaltech101(data, 2, per_class=4)
    environment = stand_in_data.cifar_environment(data)
    environment["PYTHONPATH"] = f"{REPOSITORY}{os.pathsep}{environment['PYTHONPATH']}"
    arguments = ["--data", *FORMATS, "--data_path", "data", "--methods", "CLK", "--seeds", "1"]
    arguments += [*TINY, "--time_windows", "2", "--batch_size", "8", "--parallel", "2"]
    command = [sys.executable, "-m", "experiments.study", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, arguments, done.stdout, environment


def test_all_data_are_run_measured_and_shown_beside_the_paper(both):
    folder, _, out, _ = both
    results = folder / "docs" / "results" / "study"
    found = read_csv(results / "rows.csv")
    assert [
        (x["data"], x["method"]) for x in sorted(found, key=lambda x: (x["data"], x["bits"]))
    ] == [(data, method) for data in sorted(FORMATS) for method in ("teacher", "CLK")]
    for row in found:
        assert row["options"] == "width=1 epochs=1 batch_size=8 device=cpu"
        assert float(row["energy_pj"]) > 0
        assert 0 <= float(row["spike_rate"]) <= 1
        if row["method"] == "CLK":
            assert float(row["edap_ratio"]) > 1
            assert 0 < float(row["differing_spikes"]) < 1
            drop = float(row["teacher_accuracy"]) - float(row["accuracy"])
            assert float(row["drop_to_teacher"]) == pytest.approx(drop)
    table = (results / "table.md").read_text()
    assert table.strip() in out
    for data in FORMATS:
        (line,) = (x for x in table.splitlines() if x.startswith(f"| {data} | 2 | 4 | CLK"))
        assert f"| {study_table.PAPER[data]:.2f} |" in line
    assert "second-hand" in table
    assert "±" not in table.split("\n\n")[0]  # one run each
    assert (results / "picture.png").stat().st_size > 10_000
    assert (results / "picture.pdf").read_bytes().startswith(b"%PDF")
    assert r"\toprule" in (results / "table.tex").read_text()
    assert "2 teachers, 2 students; 4 of them to run, 2 at a time" in out
    assert "time      about " in out
    assert out.count("  finished  ") == 4


def test_what_has_a_row_is_never_run_again_though_its_folder_is_gone(both, monkeypatch, capfd):
    folder, arguments, _, environment = both
    monkeypatch.chdir(folder)
    for name in ("PYTHONPATH", "CIFAR_STAND_IN"):
        monkeypatch.setenv(name, environment[name])
    (folder / "runs").rename(folder / "runs-elsewhere")
    before = (folder / "docs/results/study/rows.csv").read_bytes()
    (folder / "docs/results/study/table.md").unlink()
    code, out, err = run(arguments, capfd)
    assert (code, err) == (0, "")
    assert "0 of them to run" in out
    assert (folder / "docs/results/study/rows.csv").read_bytes() == before
    assert (folder / "docs/results/study/table.md").is_file()
    assert run(["--table"], capfd)[0] == 0


def test_forecasts_do_not_compile_and_follow_what_runs_have_taken(tmp_path, monkeypatch, capsys):
    asked: list[dict] = []

    def answer(command, input, **rest):
        asked.extend(json.loads(input))
        times = [{"seconds_an_epoch": 1.0, "seconds_an_evaluation": 1.0}] * len(json.loads(input))
        return subprocess.CompletedProcess(command, 0, json.dumps(times) + "\n", "")

    todo = planned(["--compile", "--seeds", "1", "2", "--methods", "CLK"], tmp_path)
    plan = run_plan.Plan(todo, tmp_path, [{}])
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", answer)
        study.outline(plan, [])
    said = capsys.readouterr().out
    assert (
        "time      about 7 min 16 s, as measured without --compile" in said
    )  # 4 · (5 + 100 + 4) s
    assert len(asked) == 2
    assert "--compile" in todo[0].options
    assert not any("--compile" in (*x["options"], *(x["teacher"] or ())) for x in asked)

    first, taught, second, half_done = todo
    folder = half_done.folder(tmp_path)
    folder.mkdir(parents=True)
    rows = "".join(f"{epoch},0.1\n" for epoch in range(1, 51))
    (folder / "metrics.csv").write_text(f"epoch,lr\n{rows}")
    run_plan.learn_time(plan, [second, half_done], first, took=300.0)
    assert plan.seconds[second] == 300
    assert plan.seconds[half_done] == 109  # of another kind
    run_plan.learn_time(plan, [half_done], taught, took=600.0)
    assert plan.seconds[half_done] == 300
    going = run_plan.Going(second, None, 0, time.monotonic() - 100, epochs=100)
    run_plan.learn_time(plan, [half_done], first, took=50.0)
    assert run_plan.seconds_left(plan, [half_done], [going]) == pytest.approx(500, abs=5)


def processes_in(folder: Path) -> list[Path]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if os.readlink(process / "cwd") == str(folder):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A study that was stopped, killed and went on; of two students one fails. Its folder, and
    the code, stdout and stderr of each start."""
    folder = tmp_path_factory.mktemp("stopped")
    stand_in_data.write_ncaltech101(folder / "data", 2, classes=2, per_class=20)
    arguments = ["--data", "ncaltech101", "--methods", "student", "--seeds", "1", *TINY]
    arguments += ["--data_path", "data", "--time_windows", "2", "--image_size", "16"]
    arguments += ["--batch_size", "4"]
    # The second's weights are a million times larger after every step, soon infinite.
    arguments += ["--lr", "1e3", "--weight_decay", "0", "1e3"]
    arguments += ["--teacher_lr", "0.1", "--teacher_weight_decay", "1e-4"]
    command = [sys.executable, "-m", "experiments.study", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    said = []
    for number in (signal.SIGTERM, signal.SIGKILL, None):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
        lines = []
        if number is not None:
            for line in process.stdout:
                lines.append(line)
                if "started" in line:
                    break
            process.send_signal(number)
        out, err = process.communicate(timeout=120)
        left = time.monotonic() + 30
        while processes_in(folder):  # of one that was killed they save what they have
            assert time.monotonic() < left
            time.sleep(0.05)
        said.append((process.returncode, "".join(lines) + out, err))
    return folder, arguments, said


def test_a_study_that_was_stopped_goes_on_and_one_that_was_killed_leaves_no_process(stopped):
    folder, _, said = stopped
    assert [code for code, *_ in said] == [128 + signal.SIGTERM, -signal.SIGKILL, 1]
    assert said[0][2].endswith("stopped by SIGTERM: the same command goes on\n")
    found = read_csv(folder / "docs/results/study/rows.csv")
    assert [(x["method"], x["options"]) for x in found] == [
        ("teacher", "image_size=16x16 width=1 epochs=1 batch_size=4 device=cpu"),
        (
            "student",
            "image_size=16x16 width=1 epochs=1 batch_size=4 lr=1000 weight_decay=0 device=cpu",
        ),
    ]


def test_a_run_that_fails_stops_no_other_and_is_listed_with_its_reason(stopped):
    _, _, said = stopped
    _, out, err = said[-1]
    (line,) = (x for x in err.splitlines() if x.startswith("failed: "))
    assert "weight_decay=1000" in line
    assert "not finite" in line or "NaN" in line or "infinite" in line
    assert out.count("  finished  ") == 2
    assert "| ncaltech101 | 2 | 4 | student | scratch |" in out


def test_two_studies_in_one_file_are_rows_of_their_own(stopped, monkeypatch):
    folder, arguments, _ = stopped
    monkeypatch.chdir(folder)
    found = rows.read_rows(Path("docs/results/study/rows.csv"))
    for more, number in (([], 1), (["--epochs", "2"], 3)):  # the student that fails has no row
        runs = planned([*arguments, *more], Path("runs/study"))
        assert len(study.missing(runs, found, Path("runs/study"))) == number


def test_slurm_runs_teachers_then_students_and_then_the_table(
    stopped, tmp_path, monkeypatch, shell_environment, capfd
):
    """With stand-ins for Slurm's commands, which start what they are given at once."""
    folder, arguments, _ = stopped
    monkeypatch.chdir(folder)
    arguments = [*arguments, "--name", "jobs", "--weight_decay", "0", "--bits", "3"]
    code, out, _ = run([*arguments, "--slurm"], capfd)
    assert code == 0
    assert out.splitlines()[-1] == "submit    bash runs/jobs/slurm/submit.sh [options of sbatch]"
    write_programs(tmp_path, sbatch=SBATCH, srun='[[ $1 == --ntasks=1 ]] && exec "${@:2}"')
    environment = shell_environment | {"ASKED": str(tmp_path / "asked")}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    submit = ["bash", "runs/jobs/slurm/submit.sh", "--partition=gpu"]
    done = subprocess.run(submit, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [
        "sbatch --parsable --partition=gpu runs/jobs/slurm/teachers.sh",
        "task 0",
        "sbatch --parsable --dependency=afterany:101 --partition=gpu runs/jobs/slurm/students.sh",
        "task 0",
        "sbatch --parsable --dependency=afterany:102 --partition=gpu runs/jobs/slurm/table.sh",
    ]
    found = read_csv(folder / "docs/results/jobs/rows.csv")
    assert [x["method"] for x in found] == ["teacher", "student"]
    assert (
        "| ncaltech101 | 2 | 3 | student |" in (folder / "docs/results/jobs/table.md").read_text()
    )


SBATCH = """\
echo "sbatch $*" >> "$ASKED"
script=${@: -1}
export SLURM_SUBMIT_DIR=$PWD SLURM_CPUS_PER_TASK=1
if last=$(grep -oP '^#SBATCH --array=0-\\K\\d+' "$script"); then
    for ((i = 0; i <= last; i++)); do
        echo "task $i" >> "$ASKED"
        SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$i bash "$script" >&2
    done
else
    bash "$script" >&2
fi
echo "$((100 + $(grep -c ^sbatch "$ASKED")));cluster"
"""


def test_a_slurm_task_near_its_time_limit_saves_itself_and_is_queued_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = planned(["--seeds", "1", "2", "--methods", "CL", *TINY], Path("runs/study"))[::2]
    write_jobs([one], Path("runs/study"), ["true"])
    shutil.copy("runs/study/slurm/teachers.sh", "submitted.sh")
    write_jobs([other], Path("runs/study"), ["true"])  # of a study with more seeds
    wait = 'trap "echo saved; exit 143" TERM; touch running; while :; do sleep 0.05; done'
    write_programs(tmp_path, srun=wait, scontrol='echo "$*" > asked')
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "1"}
    environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    job = subprocess.Popen(["bash", "submitted.sh"], env=environment)
    while not (tmp_path / "running").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 143
    assert (tmp_path / "asked").read_text() == "requeue 7_0\n"
    assert (one.folder(Path("runs/study")) / "log.txt").read_text() == "saved\n"


# Rows.


def row(method: str, seed: int, accuracy: float, **more: str) -> rows.Row:
    settings = {"data": "digits", "seed": str(seed), "time_window": "4", "model_depth": "18"}
    settings |= {"width": "8", "epochs": "15", "lr": "0.1"}
    settings |= {"student": {"clip_grad": "1.0"}, "teacher": {"clip_grad": "1.0"}}.get(
        method, {"clip_grad": "5.0", "loss": method, "alpha": "1.0"}
    )
    settings |= {"paper_setting": method if method == "student" else "qamd"}
    settings |= more.pop("given", {})
    found = dict.fromkeys(rows.COLUMNS, "") | {"data": "digits", "time_window": "4", "bits": "4"}
    found |= {"method": method, "start": "scratch", "seed": str(seed), "accuracy": str(accuracy)}
    found |= {"teacher_settings": f"seed={seed}", "options": "width=8 epochs=15"} | more
    words = " ".join(f"{name}={value}" for name, value in sorted(settings.items()))
    return found | {"settings": words}


def gains(found: list[rows.Row]) -> dict[str, list[float]]:
    return {
        group.about["method"]: [round(100 * x, 6) for x in group.values["gain"]]
        for group in study_table.groups_of(found)
    }


def test_the_gain_over_the_student_is_paired_by_seed_and_by_hand():
    students = [row("student", 1, 0.8), row("student", 0, 0.7), row("student", 2, 0.1)]
    found = [*students, row("CLK", 0, 0.8), row("CLK", 1, 0.78)]
    assert gains(found) == {"student": [], "CLK": [10.0, -2.0]}
    # mean 4, standard deviation 8.485, standard error 6
    _, *lines = study_table.cells_of(study_table.groups_of(found))
    about = ["digits", "4", "4", "CLK", "scratch", "2"]
    assert lines[1][:8] == [*about, "79.00 ± 1.00", "+4.00 ± 6.00"]


def test_a_run_is_compared_with_the_student_of_its_own_options():
    given = {"lr": "0.05"}
    found = [row("student", 0, 0.5), row("student", 0, 0.6, given=given, options="lr=0.05")]
    found += [row("CLK", 0, 0.8, given=given, options="lr=0.05")]
    assert gains(found)["CLK"] == [20.0]
    # clipping has another default for each, and the student with the same is the nearer one
    clipped = row("student", 0, 0.4, given={"clip_grad": "5.0"}, options="clip_grad=5")
    found = [row("student", 0, 0.5), row("CLK", 0, 0.8)]
    assert gains(found)["CLK"] == [30.0]
    assert gains([*found, clipped])["CLK"] == [40.0]


def test_seeds_of_a_fold_are_one_value_of_the_standard_error():
    accuracies = {("0", 1): 0.7, ("0", 2): 0.9, ("1", 1): 0.6, ("1", 2): 0.6}
    found = [
        row("CLK", seed, accuracy, fold=fold, given={"fold": fold})
        for (fold, seed), accuracy in accuracies.items()
    ]
    groups = study_table.groups_of(found)
    header, line = study_table.cells_of(groups)
    # folds of 80 and 60: standard deviation 14.142, standard error 10
    assert line[header.index("n") :][:2] == ["2", "70.00 ± 10.00"]
    notes = notes_of(found)
    assert "over n folds. A fold is the mean of its seeds" in notes
    notes = notes_of(found[:2])
    assert "over n seeds." in notes
    assert "fold" not in notes


def notes_of(found: list[rows.Row], cells_of=study_table.cells_of) -> str:
    groups = study_table.groups_of(found)
    return " ".join(study_table.notes_of(groups, cells_of(groups)[0]))


def test_the_notes_say_how_the_best_epoch_was_chosen_and_are_of_what_is_shown():
    by_test = row("CLK", 0, 0.5, best_accuracy="0.6", data="CIFAR10")
    by_part = row("CLK", 0, 0.5, best_accuracy="0.6", given={"val_share": "0.1"})
    assert "chosen on the test images" in notes_of([by_test])
    assert "best on the validation part" not in notes_of([by_test])
    assert "chosen on the test images" not in notes_of([by_part])
    assert "best on the validation part" in notes_of([by_part])
    assert "second-hand" in notes_of([by_test])
    for word in ("second-hand", "best epoch", "Drop", "gain"):
        assert word not in notes_of([by_test], timesteps.cells_of)


def test_the_order_of_the_rows_changes_nothing():
    """One teacher for all seeds is an option of those students that have another seed."""
    found = [
        row(method, seed, 0.5 + seed / 10, teacher_options="" if seed == 1 else "seed=1")
        for seed in (0, 1)
        for method in ("student", "CLK")
    ]
    cells = study_table.cells_of(study_table.groups_of(found))
    for order in ([1, 0, 2, 3], [3, 0, 1, 2], [0, 3, 2, 1]):
        groups = study_table.groups_of([found[i] for i in order])
        assert study_table.cells_of(groups) == cells
        assert len(study_table.picture(groups).axes) == 3  # one line of panels


def column_of(name: str, found: list[rows.Row]) -> tuple[list[str], str]:
    """A column of the table, and the note on what is the same in all rows."""
    groups = study_table.groups_of(found)
    header, *lines = study_table.cells_of(groups)
    note = study_table.notes_of(groups, header)[0]
    return [line[header.index(name)] for line in lines], note


def test_what_was_given_several_values_is_a_column_and_one_value_a_word_above():
    found = [
        row("CLK", seed, 0.5, given={"beta": f"{beta}.0"}, options=f"width=8 epochs=15 beta={beta}")
        for seed in (0, 1)
        for beta in (5, 20, 100)
    ]
    shown = column_of("beta", [*found, row("student", 0, 0.5)])
    assert shown == (["", "5", "20", "100"], "MS-ResNet-18, width 8, epochs 15.")
    vgg = {"given": {"arch": "vgg9"}, "options": "arch=vgg9 width=8 epochs=15"}
    names, note = column_of("arch", [row("CLK", 0, 0.5), row("CLK", 0, 0.6, **vgg)])
    assert names == ["resnet18", "vgg9"]
    assert "MS-ResNet-18, vgg9, width 8" in note


@pytest.mark.parametrize(
    ("name", "default", "other"),
    [
        ("reset", "hard", "soft"),
        ("leak", "0.25", "0.5"),
        ("surrogate", "rect", "atan"),
        ("augment", "basic", "none"),
        ("image_size", "64x64", "32x32"),
    ],
)
def test_a_default_beside_another_value_is_told_in_a_column(name, default, other):
    """The settings of a row leave it out: rows must not look alike for that."""
    one = row("CLK", 0, 0.5, given={"data": "folder"})
    another = row("CLK", 0, 0.6, given={"data": "folder", name: other}, options=f"{name}={other}")
    assert {*column_of(name, [one, another])[0]} == {default, other}


def test_rows_are_whole_lines_and_half_a_line_is_dropped(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    rows.append(path, [row("student", 0, 0.5), row("CLK", 0, 0.5, hardware='a "b", c')])
    with path.open("a") as file:
        file.write("digits,4,4,stud")
    assert [x["method"] for x in rows.read_rows(path)] == ["student", "CLK"]
    rows.append(path, [row("CLM", 0, 0.5)])
    found = rows.read_rows(path)
    assert [x["method"] for x in found] == ["student", "CLK", "CLM"]
    assert found[1]["hardware"] == 'a "b", c'


@pytest.mark.parametrize(
    ("written", "instead", "expected"),
    [
        (",0.5,", ",half,", "line 2: could not convert string to float: 'half'"),
        (",0.5,", ",,", "line 2: could not convert string to float: ''"),
        (",0.5,", ",50,", "line 2: accuracy 50 is no share of images"),
        (",0.5,", ",nan,", "line 2: accuracy nan is no share of images"),
        (",student,", ",pupil,", "line 2: method 'pupil'"),
        (",scratch,0,", ",scratch,zero,", "line 2: invalid literal for int"),
        ("seed=0 time", "'seed=0 time", "line 2: No closing quotation"),
        ("seed=0 time", "seed time", "line 2: settings without a value"),
        (",0.5,", ",0.5,,", f"line 2: {len(rows.COLUMNS) + 1} values for"),
        (",CLK,", ",CLK,\0,", "line 3: "),
        ("data,time", "a,b\ndata,time", "is not the rows.csv of a study of this version"),
    ],
)
def test_a_value_that_no_run_has_left_is_refused_with_its_line(
    written, instead, expected, tmp_path
):
    path = tmp_path / "rows.csv"
    rows.append(path, [row("student", 0, 0.5), row("CLK", 0, 0.6)])
    path.write_text(path.read_text().replace(written, instead, 1))
    before = path.read_bytes()
    for use in (rows.read_rows, lambda path: rows.append(path, [row("CLM", 0, 0.5)])):
        with pytest.raises(UserError, match=re.escape(expected)):
            use(path)
    assert path.read_bytes() == before


def test_a_run_is_in_the_rows_once(tmp_path):
    path = tmp_path / "rows.csv"
    rows.append(path, [row("student", 0, 0.5), row("CLK", 0, 0.6)])
    rows.append(path, [row("student", 0, 0.4), row("CLK", 1, 0.6)])
    assert [x["accuracy"] for x in rows.read_rows(path)] == ["0.5", "0.6", "0.6"]
    with path.open("a") as file:  # of two machines, put together by hand
        file.write(path.read_text().splitlines()[1] + "\n")
    with pytest.raises(UserError, match="line 5: a run that is there before"):
        rows.read_rows(path)


def test_of_studies_that_write_the_same_rows_none_loses_one(tmp_path):
    path = tmp_path / "rows.csv"
    with ThreadPoolExecutor(8) as pool:
        [*pool.map(lambda seed: rows.append(path, [row("CLK", seed, 0.5)]), range(80))]
    assert sorted(int(x["seed"]) for x in rows.read_rows(path)) == [*range(80)]


def test_a_disk_that_is_full_leaves_the_rows_as_they_were(tmp_path):
    path = tmp_path / "rows.csv"
    rows.append(path, [row("student", 0, 0.5)])
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))  # half a line
    try:
        with pytest.raises(UserError, match="cannot write"):
            rows.append(path, [row("CLK", 0, 0.5)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_a_run_whose_checkpoint_is_gone_begins_anew_and_what_is_left_is_kept(tmp_path):
    (teacher, *_) = planned(["--seeds", "1"], tmp_path)
    run_plan.write_run(teacher, tmp_path)
    folder = teacher.folder(tmp_path)
    (folder / "original-best.pth").write_text("weights")
    run_plan.write_run(teacher, tmp_path)
    assert [x.name for x in folder.iterdir()] == [run_plan.RUN]
    assert Path(f"{folder}.1", "original-best.pth").read_text() == "weights"


def test_a_run_names_every_commit_that_has_trained_it(tmp_path, monkeypatch):
    path, commits = tmp_path / "commits.txt", iter(["a1", "a1", "b2-dirty", None, "c3"])
    monkeypatch.setattr(one_run, "git_commit", lambda: next(commits))
    assert one_run.note_commit(path, anew=True) == "a1"
    assert one_run.note_commit(path, anew=False) == "a1"
    assert one_run.note_commit(path, anew=False) == "a1, then b2-dirty"
    assert one_run.note_commit(path, anew=False) == "a1, then b2-dirty, then unknown"
    assert one_run.note_commit(path, anew=True) == "c3"


def test_the_commit_of_a_run_is_the_program_s_and_not_that_of_its_results(tmp_path):
    def commit(name: str, content: str) -> None:
        (tmp_path / name).write_text(content)
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for words in (["add", "-A"], [*who, "commit", "-qm", name]):
            subprocess.run(["git", "-C", tmp_path, *words], check=True)

    assert git_commit(tmp_path) is None
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    commit("log.py", "1")
    first = git_commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", first)
    commit("rows.csv", "a")
    (tmp_path / "rows.csv").write_text("b")
    assert git_commit(tmp_path) == first
    (tmp_path / "log.py").write_text("2")
    assert git_commit(tmp_path) == f"{first}-dirty"
    commit("log.py", "3")
    assert git_commit(tmp_path) not in (first, f"{first}-dirty")


def test_the_runs_of_a_kind_take_equally_long_and_are_measured_once(tmp_path):
    runs = planned(["--seeds", "1", "2", "--lr", "0.1", "0.2", "--epochs", "3", "9"], tmp_path)
    kinds = {run_plan.kind(x) for x in runs}
    assert len(kinds) == 5  # the teacher, and four methods
    other = planned(["--batch_size", "32"], tmp_path)
    assert not {run_plan.kind(x) for x in other} & kinds


def test_the_picture_names_only_the_methods_that_were_run_in_their_colours():
    found = [row("CLM", 0, 0.5, membrane_kl="0.1"), row("student", 0, 0.4, membrane_kl="0.2")]
    figure = study_table.picture(study_table.groups_of(found))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["student", "CLM"]
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for handle, method in zip(handles, labels, strict=True):
        assert same_color(handle[0].get_color(), COLOURS[method])


def test_panels_have_one_scale_and_one_teacher_is_named_alike_everywhere():
    """However much of its recipe a student shares with it."""
    found = []
    for method, not_in_common in (("student", "clip_grad=5 lr=0.3"), ("CLK", "lr=0.3")):
        for lr, accuracy, said in (("0.1", 0.5, not_in_common), ("0.3", 0.9, "")):
            of_teacher = {"teacher_settings": "epochs=20 lr=0.3", "teacher_options": said}
            given = {"options": f"width=8 epochs=15 lr={lr}", "given": {"lr": lr}}
            found.append(row(method, 0, accuracy, **given) | of_teacher)
    groups = study_table.groups_of(found)
    cells = study_table.cells_of(groups)
    assert "teacher" not in cells[0]
    assert "teachers with clip_grad=5 lr=0.3" in study_table.notes_of(groups, cells[0])[0]
    panels = study_table.picture(groups).axes[:: len(study_table.SHOWN)]
    assert [panel.get_title(loc="left") for panel in panels] == [
        f"digits, T 4, from scratch, lr {lr}, teachers with clip_grad=5 lr=0.3" for lr in (0.1, 0.3)
    ]
    assert panels[0].get_ylim() == panels[1].get_ylim()


# Timesteps.


def test_timesteps_plans_the_one_teacher_one_for_each_t_and_one_network_for_all(tmp_path):
    runs = planned(["--seeds", "1", "--time_windows", "1", "2", "4"], tmp_path, timesteps)
    found = [
        (x.method, x.settings.trained_at, x.teacher and x.teacher.settings.time_window)
        for x in runs
    ]
    expected = [("teacher", (4,), None)]
    for T in (1, 2, 4):
        expected += [("student", (T,), 4), ("CLK", (T,), 4)]
    for T in (1, 2):
        expected += [("teacher", (T,), None), ("CLK", (T,), T)]
    assert found == [*expected, ("CLK", (1, 2, 4), 4)]


def test_a_network_for_every_t_is_measured_and_has_a_row_at_each(trained, tmp_path, capfd):
    teacher = tmp_path / "teacher" / "original-last.pth"
    shutil.copytree(trained["original"].parent, teacher.parent)
    one_run.write_json(teacher.parent / one_run.FOUND, one_run.measure(teacher, None))
    options = [*DIGITS, "--paper_setting", "qamd", "--bits", "4", "--time_windows", "1", "2"]
    options += ["--teacher_path", str(teacher), "--save_path", str(tmp_path / "every")]
    assert main.main(options) == 0
    last = tmp_path / "every" / "qamd-last.pth"
    found = one_run.measure(last, teacher)
    for T, measured in ((1, found["at"][1]), (2, found)):
        by_main = evaluated(capfd, last, "--time_window", T)
        assert measured["accuracy"] == by_main["accuracy"]
        assert measured["spike_rate"] == pytest.approx(by_main["spike_rate"])
        assert measured["membrane_kl"] > 0
    assert found["delay_ns"] > found["at"][1]["delay_ns"]
    planned = Planned("CLK", (), load_checkpoint(last).settings, None)
    one, two = rows.rows_of(planned, json.loads(json.dumps(found)))
    assert (one["time_window"], two["time_window"]) == ("1", "2")
    assert one["accuracy"] == str(found["at"][1]["accuracy"])
    assert rows.identity_of(one) != rows.identity_of(two) == planned.identity


def test_the_table_and_the_picture_of_timesteps_tell_four_kinds_of_students_apart():
    def of(method: str, T: int, teacher: int, accuracy: float, **given: str) -> rows.Row:
        costs = {"energy_pj": str(1e6 * T), "delay_ns": str(2e6 * T), "area_um2": "1e6"}
        settings = {"time_window": str(T)} | given
        found = row(method, 0, accuracy, given=settings, **costs)
        theirs = "" if method == "teacher" else f"seed=0 time_window={teacher}"
        return found | {"time_window": str(T), "teacher_settings": theirs}

    found = [of("teacher", 4, 4, 0.9) | {"bits": ""}]
    for T, accuracy in ((2, 0.6), (4, 0.7)):
        found += [of("student", T, 4, accuracy), of("CLK", T, 4, accuracy + 0.1)]
        found.append(of("CLK", T, 4, accuracy + 0.05, time_windows="'(2, 4)'"))
    found.append(of("CLK", 2, 2, 0.65))
    groups = study_table.groups_of(found)
    header, *lines = timesteps.cells_of(groups)
    shown = [header.index(x) for x in ("network", "T", "accuracy, %", "energy, µJ", "delay, ms")]
    gain = header.index("gain over student, points")
    assert [[line[i] for i in (*shown, gain)] for line in lines] == [
        ["student", "2", "60.00", "2.000", "4.000", "-"],
        ["student", "4", "70.00", "4.000", "8.000", "-"],
        ["CLK, the one teacher", "2", "70.00", "2.000", "4.000", "+10.00"],
        ["CLK, the one teacher", "4", "80.00", "4.000", "8.000", "+10.00"],
        ["CLK, a teacher of its T", "2", "65.00", "2.000", "4.000", "+5.00"],
        ["CLK, one network for T 2, 4", "2", "65.00", "2.000", "4.000", "+5.00"],
        ["CLK, one network for T 2, 4", "4", "75.00", "4.000", "8.000", "+5.00"],
        ["teacher", "4", "90.00", "4.000", "8.000", "-"],
    ]
    three = of("CLK", 2, 4, 0.62, time_windows="'(1, 2, 4)'")
    _, *more = timesteps.cells_of(study_table.groups_of([three, *found]))
    found_of = [[line[i] for i in shown[:3]] for line in more if "one network" in str(line)]
    assert found_of == [
        ["CLK, one network for T 1, 2, 4", "2", "62.00"],
        ["CLK, one network for T 2, 4", "2", "65.00"],
        ["CLK, one network for T 2, 4", "4", "75.00"],
    ]
    second = [x | {k: x[k].replace("seed=0", "seed=1") for k in rows.IDENTITY} for x in found[::-1]]
    _, *both = timesteps.cells_of(study_table.groups_of([*second[:3], *found, *second[3:]]))
    assert [line[:5] for line in both] == [line[:5] for line in lines]
    figure = timesteps.picture(groups)
    latency, energy = figure.axes
    points = {x.get_label(): x for x in latency.containers}
    # of T 4 the one teacher is one of the student's T
    assert [*points["CLK, a teacher of its T"][0].get_ydata()] == [65.0, 80.0]
    assert [*points["student"][0].get_xdata()] == [4.0, 8.0]
    assert [*energy.containers[0][0].get_xdata()] == [2.0, 4.0]

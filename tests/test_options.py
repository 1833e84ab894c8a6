"""The command line: --help, what was probably meant by a misspelt word, and --config."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

import data_loader
import main
from checkpoints import load_checkpoint
from conftest import DIGITS, refused
from experiments.plan import telling
from load_settings import parse_settings, read_settings
from runtime.errors import UserError
from settings import DATA_SETS, MAY_CHANGE, OF_CHIP, OPTIONS, build_parser, chip_defaults, is_flag
from spikesim_eval.__main__ import main as spikesim_eval
from test_bad_input import ORIGINAL, STUDENT

OF_RUN_ALONE = {name for name, about in OPTIONS.items() if about.has("alone")}


@pytest.fixture(scope="module")
def help_text() -> str:
    # Read by a person at 80 columns, whatever terminal the tests run in.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        return build_parser().format_help()


def paragraphs(help_text: str) -> dict[str, str]:
    """What the help says of each option, in one line."""
    parts = re.split(r"^  (?=-)", help_text, flags=re.M)[1:]
    words = (" ".join(part.split("\n\n")[0].split()) for part in parts)
    return {re.match(r"(?:-h, )?--(\w+)", text)[1]: text for text in words}


def test_the_help_fits_80_columns_and_has_every_option_once_in_its_group(help_text):
    assert max(map(len, help_text.splitlines())) <= 80
    groups = list(dict.fromkeys(about.group for about in OPTIONS.values()))
    starts = [help_text.index(f"\n{group}:\n") for group in groups]
    assert starts == sorted(starts)
    ends = [*starts[1:], help_text.index("\nexamples:")]
    for name, about in OPTIONS.items():
        assert len(re.findall(rf"^  --{name}\b", help_text, flags=re.M)) == 1, name
        group = groups.index(about.group)
        assert starts[group] < help_text.index(f"\n  --{name}") < ends[group], name


def test_the_help_states_each_default_once_and_it_is_the_one_that_is_used(help_text):
    said = paragraphs(help_text)
    assert all(text.count("(default") <= 1 for text in said.values())
    used = asdict(parse_settings(["--data", "CIFAR10", "--paper_setting", "original"]))
    for name, about in OPTIONS.items():
        if about.shown is None and about.constant_default in (None, False):
            assert about.constant_default is not None or "(default" not in said[name]
        elif about.shown is None:
            default = used[name] if isinstance(used[name], str) else f"{used[name]:g}"
            assert said[name].endswith(f"(default {default})"), name
    assert said["batch_size"].endswith("(default 256; digits and nmnist 64, other events 32)")
    assert said["time_window"].endswith("(default 4; events 10)")
    for name, data_set in DATA_SETS.items():
        kind = "events" if data_set.events else "images"
        batch_size = 64 if name in ("digits", "nmnist") else {"events": 32, "images": 256}[kind]
        assert data_set.batch_size == batch_size
        assert data_set.time_window == {"events": 10, "images": 4}[kind]


def test_the_help_s_three_examples_are_command_lines(help_text):
    examples = help_text.split("examples:\n")[1].replace(" \\\n     ", "").splitlines()
    assert len(examples) == 3
    for example in examples:
        build_parser().parse_args(example.split("main.py ")[1].split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "digit", *ORIGINAL[2:]], "'digit': did you mean digits? (choose from"),
        (["--data", "cifar-10"], "did you mean CIFAR10?"),
        (["--paper_setting", "orignal"], "did you mean original?"),
        ([*STUDENT, "--loss", "clk"], "did you mean CLK?"),
        ([*ORIGINAL, "--augment", "atuo"], "did you mean auto?"),
        ([*ORIGINAL, "--device", "gpu"], "(choose from 'auto', 'cpu', 'cuda', 'cuda-shared')"),
        ([*ORIGINAL, "--epoch", "3"], "unrecognized arguments: --epoch 3: did you mean --epochs?"),
        ([*ORIGINAL, "--batch-size=3"], "--batch-size=3: did you mean --batch_size?"),
        ([*ORIGINAL, "-seed", "3"], "did you mean --seed?"),
        ([*ORIGINAL, "--val", "0.1"], "--val 0.1: did you mean --val_share?"),
        ([*ORIGINAL, "--xx", "3"], "unrecognized arguments: --xx 3\n"),  # not --lr
        ([*ORIGINAL, "--qqq", "3"], "unrecognized arguments: --qqq 3\n"),
    ],
)
def test_a_misspelt_word_is_one_line_with_what_was_meant(arguments, expected, complaint):
    assert expected in complaint(arguments)


def test_a_misspelt_path_is_one_line_with_the_file_that_is_there(trained, tmp_path, complaint):
    folder = trained["original"].parent
    wrong = folder.with_name("orignal") / "original-bset.pth"
    line = complaint(["--eval_only", str(wrong)])
    assert line.endswith(f"does not exist: did you mean {trained['original']}?\n")
    line = complaint(["--config", str(folder / "setting.json")])
    assert line.endswith(f"does not exist: did you mean {folder / 'settings.json'}?\n")
    for name in ("train", "val"):
        (tmp_path / "cats" / name).mkdir(parents=True)
    line = complaint(["--data", "folder", *ORIGINAL[2:], "--data_path", "cat"])
    assert line.endswith("did you mean cats?\n")
    # Nothing that would be refused, too, is recommended: a folder instead of a checkpoint.
    (tmp_path / "network").mkdir()
    assert complaint(["--eval_only", "networks"]).endswith("exist\n")


@pytest.mark.parametrize(
    ("program", "arguments", "expected"),
    [
        (spikesim_eval, "reprot", "did you mean report?"),
        (spikesim_eval, "report --chekpoint a --out b", "--chekpoint: did you mean --checkpoint?"),
        (spikesim_eval, "report --checkpoint {}/original-bst.pth --out b", "original-best.pth?"),
        (data_loader.main, "prepare --data n-caltech101", "did you mean ncaltech101?"),
    ],
)
def test_other_commands_say_what_was_meant(program, arguments, expected, trained, capsys):
    assert expected in refused(
        capsys, program, arguments.format(trained["original"].parent).split()
    )


# --config

SETTINGS = """epochs 7 200, batch_size 32 64, lr 0.5 0.1, warmup 3, label_smoothing 0.2,
val_share 0.25, fold 3 0, clip_grad 0 1, time_window 2 4, width 3, augment none, seed 5,
save_every 9, device cpu, data_path ./data ./elsewhere, bn_bits 4 8, deterministic, amp"""
# Of runs that need no teacher: values that an option may have; of a flag none.
SETTINGS = {name: values or [""] for name, *values in map(str.split, SETTINGS.split(","))}


@st.composite
def options(draw) -> dict[str, str]:
    names = draw(st.sets(st.sampled_from(sorted(SETTINGS)), max_size=6))
    return {name: draw(st.sampled_from(SETTINGS[name])) for name in sorted(names)}


def as_arguments(options: dict[str, str]) -> list[str]:
    pairs = ((f"--{name}", *value.split()) for name, value in options.items())
    return [x for pair in pairs for x in pair]


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


@given(before=options(), now=options())
@limits(max_examples=40, deadline=None)
def test_a_run_of_a_config_is_the_old_command_with_the_new_options(before, now, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    run = parse_settings([*STUDENT, *as_arguments(before)])
    config = write(folder / "settings.json", asdict(run) | {"world_size": 2, "versions": {}})
    assert parse_settings(["--config", config, *as_arguments(now)]) == parse_settings(
        [*STUDENT, *as_arguments(before | now)]
    )


def test_a_config_of_each_paper_setting_gives_its_run_again(trained, tmp_path):
    for path in trained.values():
        settings = load_checkpoint(path).settings
        found = parse_settings(["--config", str(path.parent / "settings.json")])
        for name, value in asdict(settings).items():
            if name not in OF_RUN_ALONE:
                assert getattr(found, name) == value, name
        assert found.save_path.startswith("./checkpoints/digits-")


def test_what_is_of_a_run_alone_is_not_taken_over_and_the_help_says_so(help_text, tmp_path):
    assert {"save_path", "resume", "overwrite", "eval_only", "integer", "dry_run"} <= OF_RUN_ALONE
    assert all(f"--{name}" in paragraphs(help_text)["config"] for name in OF_RUN_ALONE)
    content = {"data": "digits", "paper_setting": "original", "save_path": "x", "overwrite": True}
    content |= {"resume": True, "dry_run": True, "integer": True, "eval_only": "absent.pth"}
    found = parse_settings(["--config", write(tmp_path / "s.json", content)])
    assert found == parse_settings(["--data", "digits", "--paper_setting", "original"])


def test_an_older_or_handwritten_config_is_filled_with_defaults(tmp_path):
    content = {"data": "digits", "paper_setting": "student", "bits": 4, "lr": 1, "num_classes": 10}
    config = write(tmp_path / "s.json", content)
    wanted = ["--data", "digits", "--paper_setting", "student", "--bits", "4", "--lr", "1"]
    assert parse_settings(["--config", config]) == parse_settings(wanted)
    part = write(tmp_path / "part.json", {"epochs": 3, "loss": "CLM"})
    assert parse_settings(["--config", part, *ORIGINAL]).epochs == 3


def test_flags_of_a_config_can_be_taken_back(tmp_path):
    flags = [name for name in OPTIONS if is_flag(name) and name not in OF_RUN_ALONE]
    assert {"amp", "compile", "deterministic", "check_numerics"} < set(flags)
    flags.remove("init_from_teacher")
    content = {"data": "digits", "paper_setting": "original"} | dict.fromkeys(flags, True)
    config = write(tmp_path / "s.json", content)
    assert all(getattr(parse_settings(["--config", config]), name) for name in flags)
    back = parse_settings(["--config", config, *(f"--no_{name}" for name in flags)])
    assert not any(getattr(back, name) for name in flags)


def test_what_has_no_meaning_any_more_is_left_out_and_never_a_default_of_another_loss(
    trained, tmp_path, capsys
):
    run = json.loads((trained["qamd"].parent / "settings.json").read_text())
    config = write(tmp_path / "qamd.json", run | {"batch_size": 64})  # its default
    teacher = parse_settings(["--config", config, "--paper_setting", "original"])
    assert (teacher.bits, teacher.loss, teacher.beta, teacher.teacher_path) == (None,) * 4
    without = parse_settings(["--config", config, "--loss", "CL"])
    assert (without.beta, without.loss) == (0.0, "CL")
    of_cl = write(tmp_path / "cl.json", asdict(without))
    assert parse_settings(["--config", of_cl, "--loss", "CLK"]).beta == 100  # not CL's 0
    # What the file says goes before a default that depends on others, and that is told.
    capsys.readouterr()
    assert parse_settings(["--config", config, "--loss", "CLM"]).beta == 100
    warning = "main.py: warning: --config keeps --beta 100.0 (the default is 30.0 here)\n"
    assert capsys.readouterr().err == warning
    other = parse_settings(["--config", config, "--paper_setting", "original", "--data", "CIFAR10"])
    assert (other.batch_size, other.clip_grad) == (64, 5.0)
    err = capsys.readouterr().err
    assert "--batch_size 64 (the default is 256 here)" in err
    assert "--clip_grad 5.0 (the default is 1.0 here)" in err
    given = ["--loss", "CLM", "--beta", "100"]
    assert parse_settings(["--config", config, *given]).beta == 100
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--beta has no meaning with --loss CL"):
        parse_settings(["--config", config, "--loss", "CL", "--beta", "3"])
    size = {"data": "digits-dvs", "paper_setting": "original", "image_size": "16x16"}
    config = write(tmp_path / "size.json", size)
    assert parse_settings(["--config", config]).image_size == "16x16"
    assert parse_settings(["--config", config, "--data", "digits"]).image_size is None


def test_a_config_goes_on_with_its_own_run(tmp_path):
    save_path = ["--save_path", str(tmp_path)]
    options = ["--width", "1", "--batch_size", "480"]
    assert main.main([*DIGITS, *options, "--paper_setting", "original", *save_path]) == 0
    again = ["--config", str(tmp_path / "settings.json"), *save_path, "--resume", "--epochs", "2"]
    assert main.main(again) == 0
    assert load_checkpoint(tmp_path / "original-last.pth").epoch == 2


def test_an_option_that_has_gone_is_read_where_it_says_what_is_so_today(trained, tmp_path):
    path = tmp_path / "settings.json"
    content = json.loads((trained["qamd"].parent / "settings.json").read_text())
    path.write_text(json.dumps(content | {"teacher_logits": "own"}))
    assert read_settings(path) == replace(
        read_settings(trained["qamd"].parent / "settings.json"), save_path=str(tmp_path)
    )
    path.write_text(json.dumps(content | {"teacher_logits": "student"}))
    with pytest.raises(UserError, match="there is no option 'teacher_logits'"):
        read_settings(path)
    older = torch.load(trained["qamd"], weights_only=True)
    older["settings"]["teacher_logits"] = "own"
    torch.save(older, tmp_path / "older.pth")
    assert (
        load_checkpoint(tmp_path / "older.pth").settings
        == load_checkpoint(trained["qamd"]).settings
    )


BROKEN = {
    "is no JSON": "{",
    "or damaged": "[" * 100_000,
    "holds no names": "[1, 2]",
    "there is no option 'learning_rat'": '{"learning_rat": 1}',
    "did you mean epochs?": '{"epoch": 1}',
    "--epochs cannot be 4.0: int is expected": '{"epochs": 4.0}',
    "--epochs cannot be True": '{"epochs": true}',
    "--epochs cannot be '4'": '{"epochs": "4"}',
    "--lr cannot be 1000000": '{"lr": 1' + "0" * 400 + "}",
    "--lr must be between": '{"lr": NaN}',
    "--width must be between": '{"width": 0}',
    "--amp cannot be 'bf16': bool is expected": '{"amp": "bf16"}',
    "did you mean digits?": '{"data": "digit"}',
    "--data_path holds a control": '{"data_path": "a\\u0000b"}',
    "--bits": '{"data": "digits", "paper_setting": "student"}',
    "--model_depth: invalid choice: 19": '{"model_depth": 19}',
}


def test_a_broken_config_is_one_line(tmp_path, complaint):
    for expected, content in BROKEN.items():
        (tmp_path / "broken.json").write_text(content)
        arguments = [] if expected == "--bits" else ORIGINAL[:2] + ORIGINAL[4:]
        line = complaint(["--config", "broken.json", *arguments])
        assert expected in line, line


def test_what_is_no_config_at_all_is_one_line(trained, complaint):
    folder = trained["original"].parent
    for path, expected in (
        ("absent.json", "--config absent.json does not exist"),
        (str(folder), f"not a folder: did you mean {folder / 'settings.json'}?"),
        (".", "not a folder\n"),
        ("/dev/zero", "it is no file"),
        ("a\0b", "cannot read --config"),
        (str(trained["original"]), "is no JSON"),
    ):
        line = complaint(["--config", path, *ORIGINAL])
        assert expected in line, path
    arguments = ["--config", str(folder / "settings.json"), "--eval_only", str(trained["original"])]
    line = complaint(arguments)
    assert "--config has no meaning with --eval_only" in line


def test_every_option_that_makes_another_run_makes_another_name_of_it(trained):
    """Or --resume would refuse what lies in the default save path of another command."""
    teacher = ["--data", "digits", "--width", "2", "--bits", "4", "--paper_setting"]
    teacher += ["qamd", "--teacher_path", str(trained["original"])]
    changes = {
        "bn_bits": "7", "alpha": "3", "beta": "3", "tau": "3", "beta_schedule": "constant",
        "loss": "CL", "batch_size": "32", "accumulate": "2", "epochs": "3", "lr": "1",
        "warmup": "1", "weight_decay": "1", "clip_grad": "3", "label_smoothing": "0.5",
        "augment": "none", "seed": "3", "val_share": "0.5", "bits": "3", "amp": "",
        "init_from_teacher": "",
        "time_windows": "1 4", "surrogate": "atan", "surrogate_width": "1",
        "init_from": str(trained["original"]), "crossbar": "spikesim-65nm-pcm",
    }  # fmt: skip
    of_chip = {
        "xbar_size": "128", "cell_bits": "2", "columns": "offset", "crossbars_per_pe": "3",
        "adc_bits": "6", "layer_adc_bits": "linear=8", "adc_of": "pe", "adc_range": "full",
        "on_off_ratio": "7", "sigma": "0.1", "level_conductances": "0,0.2,1",
        "programming": "0.1", "after": "1h", "stuck_on": "0.1", "stuck_off": "0.1",
        "read_noise": "0.1", "read_floor": "0.1",
    }  # fmt: skip
    of_teacher = {"data", "paper_setting", "model_depth", "width", "time_window", "image_size"}
    of_teacher |= {"fold", "arch", "leak", "threshold", "reset", "sensor", "split_by"}
    assert changes.keys() | of_chip.keys() | of_teacher | MAY_CHANGE == OPTIONS.keys()
    names = {parse_settings(teacher).save_path}
    for name, value in (changes | of_chip).items():
        chip = {"crossbar": changes["crossbar"]} if name in of_chip else {}
        names.add(parse_settings([*teacher, *as_arguments(chip | {name: value})]).save_path)
    assert len(names) == 1 + len(changes) + len(of_chip)


def test_a_technology_s_file_names_no_folders(tmp_path):
    file = tmp_path / "cells" / "ours.toml"
    file.parent.mkdir()
    file.write_text('like = "spikesim-65nm"\n')
    options = ["--data", "digits", "--width", "2", "--bits", "4", "--paper_setting", "student"]
    found = parse_settings([*options, "--crossbar", str(file), "--sigma", "0.1"])
    name = "digits-student-4bit-depth18-width2-T4-crossbarours-sigma0.1-seed0"
    assert found.save_path == f"./checkpoints/{name}"


def test_an_older_version_s_default_save_path_is_found_again():
    options = "--data digits --paper_setting student --bits 3 --width 2 --weight_decay 0.1 --lr 1"
    options += " --epochs 2 --augment none --accumulate 2 --batch_size 32 --clip_grad 3 --bn_bits 6"
    expected = "digits-student-3bit-depth18-width2-T4-bn-bits6-clip-grad3.0-batch-size32"
    expected += "-accumulate2-augmentnone-epochs2-lr1.0-weight-decay0.1-seed0"
    assert parse_settings(options.split()).save_path == f"./checkpoints/{expected}"


def test_a_network_trained_for_a_chip_before_a_newer_law_was_trained_without_it(trained, tmp_path):
    path, content = tmp_path / "old.pth", torch.load(trained["qamd"], weights_only=True)
    later = [name for name in OF_CHIP if OPTIONS[name].has("later")]
    assert "read_floor" in later
    own = {name: chip_defaults("spikesim-65nm")[name] for name in OF_CHIP}
    content["settings"] |= {"crossbar": "spikesim-65nm"} | own
    torch.save(content, path)
    today = load_checkpoint(path).settings
    assert today.read_floor == 0
    for name in later:
        del content["settings"][name]
    torch.save(content, path)
    assert load_checkpoint(path).settings == today
    # nor is a run of a study then another one
    assert "read_noise=0.0" in telling(today)
    assert "read_floor" not in telling(today)
    assert "read_floor=0.1" in telling(replace(today, read_floor=0.1))


def test_a_checkpoint_from_before_the_newer_options_is_read_and_none_without_the_first(
    trained, tmp_path
):
    path, content = tmp_path / "old.pth", torch.load(trained["qamd"], weights_only=True)
    for name in [name for name, about in OPTIONS.items() if about.has("added")]:
        del content["settings"][name]
    torch.save(content, path)
    assert load_checkpoint(path).settings == load_checkpoint(trained["qamd"]).settings
    for name in content["settings"]:
        less = {key: value for key, value in content["settings"].items() if key != name}
        torch.save(content | {"settings": less}, path)
        if name in OPTIONS:
            with pytest.raises(UserError, match="settings are not this version's"):
                load_checkpoint(path)

"""The membrane report, in its smallest form."""

import torch

from conftest import read_csv
from distiller import distance_to_teacher, start_membrane_steps
from experiments.membrane_report import RoundedTeacher
from experiments.membrane_report import main as membrane_report
from load_settings import load_network
from models import QuanMSResNet


def test_the_membrane_report_has_a_row_per_network_layer_and_timestep(trained, tmp_path, capfd):
    networks = ["--teacher", str(trained["original"]), "--student", str(trained["student"])]
    networks += ["--mdsnn", str(trained["qamd"])]
    assert membrane_report([*networks, "--out", str(tmp_path / "report")]) == 0
    rows = read_csv(tmp_path / "report" / "membrane_report.csv")
    assert len(rows) == 3 * 17 * 4
    assert (tmp_path / "report" / "membrane_report.png").stat().st_size > 10_000
    assert (tmp_path / "report" / "membrane_report.pdf").read_bytes().startswith(b"%PDF")
    assert membrane_report([*networks, "--out", str(tmp_path / "other"), "--layer", "lif9"]) == 2
    assert "the LIF layers are blocks" in capfd.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_rounded_teacher_fires_as_the_teacher_and_comes_closer_with_every_bit(trained):
    teacher = load_network(trained["original"])
    images = torch.rand(8, 1, 16, 16)
    distances = []
    for bits in (2, 4, 8):
        student = QuanMSResNet(18, 10, 4, 1, 2, bits=bits)
        start_membrane_steps(student, teacher, images)
        rounded = RoundedTeacher(teacher, student)
        distances.append(distance_to_teacher(teacher, rounded, [(images, None)]))
        assert distances[-1]["differing_spikes"].mean() < 1e-3  # steps lie on a grid
        for u in rounded(images)[1]:
            assert 2 < len(u.unique()) <= 2**bits
    for name in ("membrane_kl", "membrane_mse"):
        two, four, eight = (distance[name].mean() for distance in distances)
        assert two > 2 * four > 4 * eight > 0

"""benchmarks/exported.py, in its smallest form."""

from importlib.util import find_spec

import pytest


@pytest.mark.skipif(
    find_spec("onnx") is None or find_spec("onnxruntime") is None,
    reason="needs onnx and onnxruntime",
)
def test_the_benchmark_of_exported_networks_prints_and_writes_its_tables(
    tmp_path, capsys, monkeypatch
):
    from benchmarks import exported

    monkeypatch.setattr(exported, "CALLS", 1)
    monkeypatch.setattr(exported, "TIME_STEPS", 1)
    threads = exported.torch.get_num_threads()
    out = tmp_path / "exported.md"
    exported.main(["--rounds", "1", "--out", str(out)])
    exported.torch.set_num_threads(threads)
    text = out.read_text()
    assert text in capsys.readouterr().out
    for row in ("torch", "torch, folded", "torch.export", "onnxruntime", "neurons"):
        assert f"\n| {row} | " in text

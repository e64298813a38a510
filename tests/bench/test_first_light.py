"""The script for the first minutes on a GPU: its dry run, its clocks, and what it writes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import first_light
from bench.first_light import CUT, PARTS, Part, main, run

PYTHON = sys.executable


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is one on a CPU")
def test_a_dry_run_does_every_part(tmp_path, capsys):
    assert main(["--dry-run", f"--output={tmp_path}"]) == 0, capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["machine"]["torch"] == torch.__version__
    assert summary["machine"]["commit"]
    assert [row["part"] for row in summary["parts"]] == [
        "check", "tests", "speed", "speed", "tune", "tune", "sanitize",
    ]  # fmt: skip
    assert all(row["ended"] == 0 for row in summary["parts"])
    checked = json.loads((tmp_path / "check-0.log").read_text().splitlines()[-1])["checked"]
    assert {each["launcher"] for each in checked} == {"shrink", "expand_y"}
    for name, factors in (("speed.json", None), ("speed-float32.json", "float32")):
        rows = json.loads((tmp_path / name).read_text())
        assert {row["factors"] for row in rows} == {factors}
        assert {row["implementation"] for row in rows} == {"frozen", "loralib", "lora_kernels"}
    assert '"algorithms"' in (tmp_path / "tune-1.log").read_text()
    assert (tmp_path / "sanitize-0.log").read_text().splitlines() == [
        "shrink right",
        "gemm_fwd right",
    ]
    assert len(os.listdir(tmp_path / "cache")) == 3  # checked, tuned and its lock


def test_a_part_is_ended_by_its_clock_and_the_next_one_runs(tmp_path):
    slow = (PYTHON, "-uc", "import time; print('begun'); time.sleep(60)")
    quick = (PYTHON, "-c", "print('done')")
    parts = (Part("slow", 1.5, (slow, quick), ()), Part("quick", 30, (quick,), ()))
    lines = []
    rows = run(parts, tmp_path, dry=False, write=lines.append)
    assert [row["ended"] for row in rows] == [CUT, CUT, 0]
    assert rows[0]["seconds"] < 30
    assert (tmp_path / "slow-0.log").read_text().startswith("begun")
    assert (tmp_path / "quick-0.log").read_text() == "done\n"
    assert len(lines) == 3


STUBBORN = """
import os, signal, subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code])
open(sys.argv[1], "w").write(str(child.pid))
"""


def ends(pid: int) -> bool:
    """Whether the process ends soon: a signal takes a moment to arrive."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@needs_proc
@pytest.mark.parametrize("rest", ["time.sleep(60)", ""], ids=["cut", "done"])
def test_nothing_of_a_part_runs_on_beside_the_next(rest, tmp_path):
    command = (PYTHON, "-c", STUBBORN + rest, str(tmp_path / "pid"))
    run((Part("one", 5, (command,), ()),), tmp_path, dry=False, write=lambda line: None)
    assert ends(int((tmp_path / "pid").read_text()))


@needs_proc
def test_a_part_ends_with_the_script(tmp_path):
    """As by timeout(1), which sends SIGTERM to the script alone."""
    code = (
        "import os, signal, sys\n"
        "from bench import first_light\n"
        f"ends = {STUBBORN + 'os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)'!r}\n"
        f"command = (sys.executable, '-c', ends, {str(tmp_path / 'pid')!r})\n"
        "first_light.PARTS = (first_light.Part('check', 60, (), (command,)),)\n"
        f"sys.exit(first_light.main(['--dry-run', '--output={tmp_path / 'out'}']))"
    )
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 143, done.stderr
    assert ends(int((tmp_path / "pid").read_text()))


def test_what_there_is_is_written_before_the_next_part(tmp_path):
    read = f"import json; print(len(json.load(open({str(tmp_path / 'summary.json')!r}))['parts']))"
    fails = (PYTHON, "-c", "import sys; sys.exit(3)")
    parts = (Part("one", 30, (fails,), ()), Part("two", 30, ((PYTHON, "-c", read),), ()))
    rows = run(parts, tmp_path, dry=False, write=lambda line: None)
    assert [row["ended"] for row in rows] == [3, 0]
    assert (tmp_path / "two-0.log").read_text() == "1\n"


def test_a_program_that_is_not_there_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (part,) = (part for part in PARTS if part.name == "sanitize")
    rows = run((part,), tmp_path, dry=False, write=lambda line: None)
    assert {row["ended"] for row in rows} == {"skipped: there is no compute-sanitizer"}


def test_its_parts_fit_into_ten_minutes():
    assert sum(part.seconds for part in PARTS) <= 600


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_a_dry_run_or_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit):
        first_light.main([f"--output={tmp_path / 'out'}"])
    assert "there is no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

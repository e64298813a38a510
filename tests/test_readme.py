"""README.md holds true: its Python runs, and CI finds its commands."""

import re
from pathlib import Path

import lora_kernels
from tests import torchrun

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_one_after_the_other(tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    for name, value in torchrun.environment().items():
        monkeypatch.setenv(name, value)
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
    assert len(blocks) == README.count("```python")
    names = {}
    try:
        for block in blocks:
            line = README[: block.start(1)].count("\n")
            exec(compile("\n" * line + block[1], "README.md", "exec"), names)
    finally:
        lora_kernels.unpatch_peft()
    assert blocks


def test_every_name_it_mentions_with_the_package_exists():
    mentioned = set(re.findall(r"\blora\.(\w+)", README)) - {"pt"}
    assert {"apply_lora", "Linear"} <= mentioned
    assert not {name for name in mentioned if not hasattr(lora_kernels, name)}


def test_commands_that_ci_runs_stand_right_behind_their_markers():
    commands = {
        "main": "python -m examples.finetune",
        "test": "pytest tests -n 2 --dist loadfile",
    }
    for marker, ending in commands.items():
        blocks = re.findall(rf"^<!-- ci: {marker} -->\n```bash\n(.*?)^```$", README, re.M | re.S)
        assert len(blocks) == 1
        assert blocks[0].endswith(f"{ending}\n")
        assert f"run_readme_block {marker}" in (REPOSITORY / ".ci/run").read_text().splitlines()

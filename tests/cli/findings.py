"""What lora-kernels doctor finds in this process."""

import json

from lora_kernels.cli import main


def found(capsys) -> tuple[int, dict]:
    code = main(["doctor", "--json"])
    return code, json.loads(capsys.readouterr().out)

"""The commands of docs/checkpoints.md, in their order."""

import re
import shlex
import subprocess

import pytest

from tests.faults.job import read_metrics, write_config
from tests.support import launching

PAGE = launching.ROOT / "docs" / "checkpoints.md"


@pytest.mark.slow
def test_the_commands_continue_one_run(tmp_path, tiny_base):
    config = write_config(
        tmp_path,
        tiny_base,
        run={"max_steps": None, "epochs": 1},
        data={"batch_size": 4},
        checkpoint={"save_steps": 100},
    )
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    for epochs, line in enumerate(block.splitlines(), start=1):
        command, *arguments = shlex.split(line)
        assert command == "deepspeed", line
        command = [command, "--master_port", launching.free_port(), *arguments]
        done = subprocess.run(
            command, cwd=config.parent, env=launching.free_environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        steps = [line["step"] for line in read_metrics(tmp_path / "run") if line["event"] == "step"]
        assert steps == list(range(1, 3 * epochs + 1))  # 24 samples, 8 a step

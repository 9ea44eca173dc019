"""A command by itself and in two processes of accelerate, to see that both say the same."""

import json
import os
import subprocess
import sys
from typing import Any

LAUNCH = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]


def alone_and_together(*arguments: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``hf-tokenprune ... --json`` prints.

    accelerate starts several CPU processes under --multi_gpu only; ACCELERATE_USE_CPU keeps them on the CPU.
    """
    command = ["-m", "hf_tokenprune.cli", *map(str, arguments), "--json"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def printed(args: list[str]) -> dict[str, Any]:
        done = subprocess.run([sys.executable, *args], capture_output=True, check=True, text=True, env=environment)
        return json.loads(done.stdout)

    return printed(command), printed([*LAUNCH, *command])

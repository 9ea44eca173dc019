"""Commands of ``hf-tokenprune`` by themselves and in two processes of accelerate, to see that both say the same.

As a script: runs the commands in the JSON of its first argument one after the other, where all is imported once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LAUNCH = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]
Numbers = dict[str, Any]


def alone_and_together(commands: list[list[str]]) -> list[tuple[Numbers, Numbers]]:
    """What each ``hf-tokenprune ... --json`` prints.

    accelerate starts several CPU processes under --multi_gpu only; ACCELERATE_USE_CPU keeps them on the CPU.
    """
    script = [__file__, json.dumps(commands)]
    ours = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}

    def printed(args: list[str]) -> list[Numbers]:
        done = subprocess.run([sys.executable, *args], capture_output=True, text=True, env={**os.environ, **ours})
        assert done.returncode == 0, done.stderr[-4000:]
        decode, rest, found = json.JSONDecoder().raw_decode, done.stdout.strip(), []
        while rest:
            numbers, end = decode(rest)
            found.append(numbers)
            rest = rest[end:].strip()
        return found

    return list(zip(printed(script), printed([*LAUNCH, *script]), strict=True))


if __name__ == "__main__":
    from hf_tokenprune.cli import app

    for command in json.loads(sys.argv[1]):
        assert not app([*command, "--json"], standalone_mode=False)

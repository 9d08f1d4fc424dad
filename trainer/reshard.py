"""A DeepSpeed checkpoint of other devices than those at hand, made readable for them.

ZeRO writes one part per device; DeepSpeed's own converter puts them together into its universal
form, which any number of devices reads. Owns where that form is kept while it is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from trainer.monitor import TrainingStopped


def reshard(checkpoint: Path, out: Path) -> None:
    """Write the universal form of `checkpoint` to `out`, which load_checkpoint takes as a folder.

    Takes as much room as the states of what trains, 12 bytes a parameter. Raises TrainingStopped.
    """
    try:
        step = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(checkpoint, str(error)) from error
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    # Of one step, not of a launch: what a launcher says of its processes is not for it.
    launch = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    done = subprocess.run(
        [
            *command,
            *("--input_folder", str(checkpoint / step), "--output_folder", str(out / step)),
            *("--num_extract_workers", "2", "--num_merge_workers", "2", "--inject_missing_state"),
        ],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in launch},
    )
    if done.returncode:
        shutil.rmtree(out, ignore_errors=True)
        raise _unreadable(checkpoint, (done.stderr.strip().splitlines() or ["no reason given"])[-1])


def _unreadable(checkpoint: Path, why: str) -> TrainingStopped:
    return TrainingStopped(
        f"{checkpoint} cannot be put together for other devices: {why}",
        hint="Go on with as many devices as wrote it, or remove it to go on from an earlier one.",
    )

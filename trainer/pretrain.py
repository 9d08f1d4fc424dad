"""`python -m trainer.pretrain`: stage 1 of training. See `--help`."""

import sys

from trainer.command import stage_command
from w2c_tui.console import run

if __name__ == "__main__":
    sys.exit(run(stage_command("pretrain")))

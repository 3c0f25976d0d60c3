"""Pre-train, fine-tune and evaluate VLMo: `python run.py with <named config> option=value ...`; see `vlmo/train.py`."""

import sys

from vlmo.train import command_line

if __name__ == "__main__":
    sys.exit(command_line(sys.argv))

"""A run of several processes that notes which samples each trains on.

python watched_run.py CONFIG.json LISTING [EPOCH PASS]
"""

import json
import logging
import sys
from pathlib import Path

from vlmo.errors import Stopped, VLMoError, print_error
from vlmo.modules import VLMo
from vlmo.training.runner import run


def main(config, listing, *broken):
    broken = [int(number) for number in broken]  # epoch and pass whose loss the second process makes NaN
    logging.basicConfig(level=logging.INFO)
    step = VLMo.training_step

    def watched(model, batch, batch_idx):
        place = [model.current_epoch, batch_idx, batch["raw_index"].tolist()]
        with Path(f"{listing}.{model.global_rank}").open("a") as file:
            file.write(json.dumps(place) + "\n")
        loss = step(model, batch, batch_idx)
        return loss * float("nan") if place[:2] == broken and model.global_rank == 1 else loss

    VLMo.training_step = watched
    try:
        run(json.loads(Path(config).read_text()))
    except VLMoError as error:
        return print_error(error)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""jobs/evaluate.py, which stands still at moments that a test names until the test says go on; see gate.py.

Takes the path of evaluate.py, a folder, and the moments' names, joined by commas, before the arguments of evaluate.py.
It imports nothing else of the tests, because `ray submit` copies it alone.
"""

import runpy
import sys
import time
from pathlib import Path

from pipeline.driver import job

# By name, whether a progress is the moment. In decoding, some shards are decoded then and some not even begun, if there
# are more than the 32 that are in flight at a time; in training, it is an epoch between the first and the last.
MOMENTS = {
    "start": lambda progress: progress.phase == "start",
    "nodes": lambda progress: progress.phase == "nodes",
    "decode": lambda progress: progress.phase == "decode" and 0 < progress.done < progress.total,
    "fed": lambda progress: progress.phase == "train",
    "train": lambda progress: progress.phase == "train" and 1 < progress.epoch < progress.num_epochs,
    "score": lambda progress: progress.phase == "score",
}


def stand_still(folder, moment):
    """Say that this is the moment, and wait for the word to go on."""
    (folder / moment).touch()
    while not (folder / f"{moment}.go").exists():
        time.sleep(0.01)


def main():
    """Run the command with its own arguments."""
    path, folder, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(",")
    sys.argv = [path, *sys.argv[4:]]
    folder.mkdir(parents=True, exist_ok=True)
    to_come = [(name, MOMENTS[name]) for name in names]
    run = job.evaluate

    def run_gated(config, on_progress, on_download):
        def show(progress):
            if to_come and to_come[0][1](progress):
                stand_still(folder, to_come.pop(0)[0])
            on_progress(progress)

        return run(config, show, on_download)

    job.evaluate = run_gated  # the command's own screen, signals and exit status are what is tested
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main()

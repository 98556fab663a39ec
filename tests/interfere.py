"""Run a training script with one thing going wrong: ``interfere.py WHAT script arguments…``.

kill:NAME        this process is SIGKILLed when it is about to give a file its final name NAME
fail:STEP        rank 1 raises an InputError in its STEP-th training step, or with STEP 0 when it reads the data set
benchmark:RANK   this rank is SIGKILLed when it begins to measure IJB or TinyFace
nowrite:FOLDER   every rank but 0 dies if it opens anything below FOLDER for writing
"""

import os
import runpy
import signal
import sys
from pathlib import Path

what, value = sys.argv[1].split(":", 1)
script = sys.argv[2]
sys.argv = sys.argv[2:]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
RANK = int(os.environ.get("RANK", 0))

if what == "kill":
    replace = os.replace

    def killing_replace(source, destination):
        if Path(destination).name == value:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, destination)
    os.replace = killing_replace
elif what == "fail" and RANK == 1:
    from train import setup
    from train.engine import Engine
    from utils.errors import InputError
    train_step, build_dataset = Engine.train_step, setup.build_dataset

    def failing_dataset(cfg):
        if value == "0":
            raise InputError("rank 1 cannot go on")
        return build_dataset(cfg)
    setup.build_dataset = failing_dataset

    def failing_step(self, source):
        if self.step + 1 == int(value):
            raise InputError("rank 1 cannot go on")
        return train_step(self, source)
    Engine.train_step = failing_step
elif what == "benchmark" and RANK == int(value):
    from train import engine
    engine.run_benchmark = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
elif what == "nowrite" and RANK > 0:
    def watch(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, bytes)) and os.fsdecode(arguments[0]).startswith(value) and \
                (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            os.write(2, f"rank {RANK} writes {arguments[0]}\n".encode())
            os._exit(9)
    sys.addaudithook(watch)

runpy.run_path(script, run_name="__main__")

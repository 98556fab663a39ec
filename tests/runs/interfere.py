"""Run a training script with one thing going wrong: ``interfere.py WHAT script arguments…``.

kill:NAME        this process is SIGKILLed when it is about to give a file its final name NAME
fail:STEP        rank 1 raises an InputError in its STEP-th training step, or with STEP 0 when
                 it reads the data set
die:STEP         rank 1 is SIGKILLed in its STEP-th training step, of torchrun's first start
                 only
hang:STEP        rank 1 waits there for ever; of the first start only. Until then nobody is said
                 to hang, however busy the machine is
hold:STEP        every rank waits for ever when it has done STEP steps
full:STEP        the disk is full when rank 0 saves the backbone of that step: its files may not
                 grow beyond 100 kB (the first start only)
benchmark:RANK   this rank is SIGKILLed when it begins to measure IJB or TinyFace
nowrite:FOLDER   every rank but 0 dies if it opens anything below FOLDER for writing
"""

import math
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

what, value = sys.argv[1].split(":", 1)
script = sys.argv[2]
sys.argv = sys.argv[2:]
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
RANK = int(os.environ.get("RANK", 0))

if what == "kill":
    replace = os.replace

    def killing_replace(source, destination):
        if Path(destination).name == value:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, destination)

    os.replace = killing_replace
elif what == "fail" and RANK == 1:
    from train import build
    from train.engine import Engine
    from utils.errors import InputError

    train_step, build_dataset = Engine.train_step, build.build_dataset

    def failing_dataset(cfg):
        if value == "0":
            raise InputError("rank 1 cannot go on")
        return build_dataset(cfg)

    build.build_dataset = failing_dataset

    def failing_step(self, source):
        if self.position.step + 1 == int(value):
            raise InputError("rank 1 cannot go on")
        return train_step(self, source)

    Engine.train_step = failing_step
elif what == "die" and RANK == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    from train.engine import Engine

    train_step = Engine.train_step

    def dying_step(self, source):
        if self.position.step + 1 == int(value):
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, source)

    Engine.train_step = dying_step
elif what == "hang" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    from train.engine import Engine
    from utils.run.hang_watch import Watch

    train_step, enter, watches = Engine.train_step, Watch.__enter__, []

    def patient_enter(self):
        self.limit = self.seconds
        self.seconds = math.inf
        watches.append(self)
        return enter(self)

    Watch.__enter__ = patient_enter

    def hanging_step(self, source):
        if self.position.step + 1 == int(value):
            watches[0].seconds = watches[0].limit
            if RANK == 1:
                time.sleep(600)
        return train_step(self, source)

    Engine.train_step = hanging_step
elif what == "hold":
    from train.engine import Engine

    train_step = Engine.train_step

    def holding_step(self, source):
        if self.position.step == int(value):
            time.sleep(600)
        return train_step(self, source)

    Engine.train_step = holding_step
elif what == "full" and RANK == 0 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    from utils.run.folder import RunFolder

    save = RunFolder.save

    def failing_save(self, step, *arguments):
        if step == int(value):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return save(self, step, *arguments)

    RunFolder.save = failing_save
elif what == "benchmark" and RANK == int(value):
    from train import validation

    validation.run_test_set = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
elif what == "nowrite" and RANK > 0:

    def watch(event, arguments):
        if (
            event == "open"
            and isinstance(arguments[0], (str, bytes))
            and os.fsdecode(arguments[0]).startswith(value)
            and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            os.write(2, f"rank {RANK} writes {arguments[0]}\n".encode())
            os._exit(9)

    sys.addaudithook(watch)

runpy.run_path(script, run_name="__main__")

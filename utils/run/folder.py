"""The checkpoints of a run: its folder, what is complete in it, written by write-then-rename."""

import logging
import re
import shutil
import zipfile
from pathlib import Path

import torch

from utils.errors import InputError, first_line
from utils.files import replacing
from utils.weights.kinds import UNREADABLE
from utils.weights.load import load_backbone
from utils.weights.read import read_tensors

HALF_WRITTEN = re.compile(
    r"(\d+(backbone|header|state|ema)\.pth|best_backbone\.pth|config\.json|metrics\.jsonl)"
    r"\.tmp-\d+"
)
GO_ON = "earlier checkpoints are untouched, go on with --resume"


def save(content: dict, path: Path, advice: str = GO_ON) -> None:
    """Write under a temporary name, flush to the disk, rename: ``path`` is whole or not there.

    Raises InputError, with the advice, if the disk is full or the folder not writable; the
    temporary file is gone then.
    """
    try:
        with replacing(path) as file:
            torch.save(content, file)
    # torch reports a failed write as RuntimeError
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot save {path} ({error}); {advice}") from error


class RunFolder:
    """The checkpoints of one run.

    ``<step>backbone.pth``, ``<step>header.pth`` or the folder ``<step>header`` (weights),
    ``<step>ema.pth`` (the weights' average, if there is one), ``<step>state.pth`` (the rest),
    ``best_backbone.pth``.
    A step is complete once its state is there, which is written last.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def file(self, step: int, part: str) -> Path:
        return self.path / f"{step}{part}.pth"

    def shards(self, step: int) -> Path:
        """The folder of a header that is in no one file (utils/run/header_shards.py)."""
        return self.path / f"{step}header"

    def header(self, step: int) -> Path:
        """Where the header of a step lies: its file, or its folder of shares."""
        return self.shards(step) if self.shards(step).is_dir() else self.file(step, "header")

    def steps(self, part: str) -> list[int]:
        stems = [file.stem for file in self.path.glob(f"*{part}.pth")]
        matches = [re.fullmatch(rf"(\d+){part}", stem) for stem in stems]
        return sorted(int(match[1]) for match in matches if match)

    def complete_steps(self) -> list[int]:
        """Steps from which a run can go on, oldest first."""
        return [
            step
            for step in self.steps("state")
            if self.file(step, "backbone").is_file()
            and (self.file(step, "header").is_file() or self.shards(step).is_dir())
        ]

    def damage(self, step: int) -> str:
        """What is wrong with the files of a complete step, in one line.

        "" if they can be read to the end.
        """
        sharded = self.shards(step).is_dir()
        parts = ["backbone", "state"]
        if not sharded:
            parts.append("header")
        if self.file(step, "ema").is_file():
            parts.append("ema")
        for part in parts:
            file = self.file(step, part)
            try:
                with zipfile.ZipFile(file) as archive:
                    damaged = archive.testzip()
                if damaged:
                    return f"{file}: {damaged} does not have the sum it was written with"
            except (*UNREADABLE, zipfile.BadZipFile) as error:
                return f"{file}: {first_line(error, 120)}"
        if sharded:
            # torch.distributed.checkpoint takes a second to import
            from utils.run.header_shards import damage_of

            return damage_of(self.shards(step))
        return ""

    def prepare(self) -> None:
        """Make the folder. Raises InputError if it cannot be made or written to."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "training.log").touch()
        except OSError as error:
            raise InputError(
                f"output: cannot write to {self.path} ({error.strerror}); choose "
                "another folder with output="
            ) from error

    def sweep(self) -> None:
        """Remove what a killed run left half written."""
        for leftover in self.path.glob("*.tmp*"):
            if HALF_WRITTEN.fullmatch(leftover.name):
                leftover.unlink()
            elif re.fullmatch(r"\d+header\.tmp", leftover.name):
                shutil.rmtree(leftover)

    def rewind(self, step: int) -> list[int]:
        """Forget the states after ``step``, for a run that goes on from there; returns their steps.

        The weights stay.
        """
        later = [other for other in self.steps("state") if other > step]
        for other in later:
            self.file(other, "state").unlink()
        return later

    def save(
        self,
        step: int,
        backbone: dict,
        header: dict | None,
        state: dict,
        keep_states: int,
        average: dict | None = None,
    ) -> None:
        """Write one step, then drop states beyond the newest ``keep_states``.

        With them go the weights of those that were no epoch's end.
        header None: all ranks have written it to ``shards(step)`` with the suffix .tmp.
        average None: there is none.
        """
        save(backbone, self.file(step, "backbone"))
        if average is not None:
            save(average, self.file(step, "ema"))
        else:
            self.file(step, "ema").unlink(missing_ok=True)
        # a run that went back may have left the header of this step in the other form
        if self.shards(step).is_dir():
            shutil.rmtree(self.shards(step))
        if header is not None:
            save(header, self.file(step, "header"))
        else:
            self.file(step, "header").unlink(missing_ok=True)
            self.shards(step).with_suffix(".tmp").rename(self.shards(step))
        save(state, self.file(step, "state"))
        for old in self.complete_steps()[:-keep_states]:
            try:
                epoch_end = read_tensors(self.file(old, "state"), "old state")["samples"] == 0
            except InputError as error:
                # damaged on the disk since: the step just saved counts, the old weights stay
                logging.warning("%s", error)
                epoch_end = True
            self.file(old, "state").unlink()
            if not epoch_end:
                self.file(old, "backbone").unlink()
                self.file(old, "ema").unlink(missing_ok=True)
                self.file(old, "header").unlink(missing_ok=True)
                shutil.rmtree(self.shards(old), ignore_errors=True)

    def load(self, step: int, network: torch.nn.Module) -> dict | None:
        """Load the student's weights of a step; returns the header's state.

        None if that lies in ``shards(step)``.
        """
        load_backbone(network, self.file(step, "backbone"), "resume")
        if self.shards(step).is_dir():
            return None
        return read_tensors(self.file(step, "header"), "resume")

    def load_state(self, step: int) -> dict:
        """All else that a run needs to go on from a step."""
        return read_tensors(self.file(step, "state"), "resume")

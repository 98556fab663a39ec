"""Records that cannot be read: counted over all ranks, and too many of them end a run."""

import logging

import torch

from utils import distributed
from utils.errors import InputError


class DamagedRecords:
    """{key: reason} of the records that others took the place of; too many end the run."""

    def __init__(self, most: int):
        self.most = most
        self.reasons = {}
        self.shared = 0

    def note(self, damaged: list[tuple]) -> None:
        """Remember (key, reason) pairs of a batch. Raises InputError if there are too many."""
        for key, reason in damaged:
            if key not in self.reasons:
                self.reasons[key] = reason
                logging.warning("damaged record %s, another one takes its place: %s", key, reason)
        refuse_too_many(sorted(self.reasons, key=str), self.most)

    def share(self) -> None:
        """Let every rank know what others have met, and stop all together if it is too much."""
        fresh = len(self.reasons) - self.shared
        if distributed.all_reduce(torch.tensor(float(fresh))).item():
            everyone = distributed.all_gather_object(self.reasons)
            self.reasons = {key: reason for own in everyone for key, reason in own.items()}
        self.shared = len(self.reasons)
        refuse_too_many(sorted(self.reasons, key=str), self.most)


def refuse_too_many(names: list, most: int) -> None:
    """Raises InputError if more than ``most`` records, of these names, are damaged."""
    if len(names) > most:
        raise InputError(
            f"{len(names)} damaged records are more than "
            f"max_bad_records={most}: {', '.join(map(str, names))}"
        )

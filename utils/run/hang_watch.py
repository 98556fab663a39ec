"""Names the rank that hangs, for which all others wait in a collective without a word.

Every rank posts once a second, from a thread, how many collectives and batches it has begun. Where
nothing has moved on a rank for ``minutes``, its thread looks at what the others have posted: who
has fallen silent (stopped, its machine gone), else who has begun fewest, is who the others wait
for.
"""

import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from utils import distributed

# Seconds between posts.
EVERY = 1.0
# After so many seconds without a post a process does not run.
SILENT = 5.0


class Watch:
    """``with Watch(minutes):`` around what all ranks do together.

    Ends this process when it stands still. Nothing to do for a world of one, or for 0 minutes.
    """

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.rank = distributed.rank()
        self.world = distributed.world_size()
        self.active = self.world > 1 and minutes > 0
        self.stopped = threading.Event()

    def __enter__(self) -> "Watch":
        if self.active:
            self.store = distributed.join_store(timedelta(seconds=60))
            self.store.set_timeout(timedelta(seconds=SILENT))
            self.thread = threading.Thread(target=self.watch, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_error) -> None:
        if self.active:
            self.stopped.set()
            self.thread.join(SILENT)

    def watch(self) -> None:
        """Post and look, until the block ends.

        What others have posted is compared over SILENT seconds, before anybody is said to be
        silent.
        """
        count = 0
        begun = -1
        since = time.monotonic()
        before = None
        while not self.stopped.wait(EVERY):
            count += 1
            if distributed.begun != begun:
                begun = distributed.begun
                since = time.monotonic()
                before = None
            standing = time.monotonic() - since
            try:
                self.store.set(f"watch/{self.rank}", f"{count} {distributed.begun}")
                if standing > self.seconds and before is None:
                    before = self.posts()
                elif standing > self.seconds + SILENT:
                    self.end(before, self.posts())
            except dist.DistError:
                # on several machines rank 0's process holds the store
                if standing > self.seconds:
                    self.say_and_exit(
                        "rank 0, which holds the store in which ranks report, no longer answers"
                    )

    def end(self, before: list, after: list) -> None:
        """Say who is waited for, once, and end this process.

        torchrun then ends the others, or restarts all.
        """
        silent = [rank for rank in range(self.world) if before[rank][0] == after[rank][0]]
        fewest = min(begun for _, begun in after)
        behind = silent or [rank for rank in range(self.world) if after[rank][1] == fewest]
        waiting = [rank for rank in range(self.world) if rank not in behind]
        if self.rank != min(waiting, default=0):
            # the one that speaks comes first
            time.sleep(2)
            os._exit(1)
        if silent:
            state = "no longer answers"
        elif waiting:
            state = "is behind"
        else:
            state = "stand still at the same point"
        names = ("rank " if len(behind) == 1 else "ranks ") + ", ".join(map(str, behind))
        others = ", the others wait for it" if waiting else ""
        self.say_and_exit(f"{names} {state}{others}")

    def say_and_exit(self, what: str) -> None:
        since = f"no progress for {self.seconds:g} seconds (timeout)"
        print(f"error: {since}: {what}; go on with --resume", file=sys.stderr, flush=True)
        os._exit(1)

    def posts(self) -> list[tuple[int, int]]:
        """(posts, collectives begun) of every rank; zeros for one that has never posted."""
        keys = [f"watch/{rank}" for rank in range(self.world)]
        return [
            tuple(map(int, self.store.get(key).split())) if self.store.check([key]) else (0, 0)
            for key in keys
        ]

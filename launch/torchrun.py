"""torchrun, without the report that it prints below a message the training script has already
given.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError
from torch.distributed.run import main

if __name__ == "__main__":
    # of the launcher only: the training processes log for themselves
    logging.disable(logging.ERROR)
    try:
        main()
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        # killed: it could say nothing itself
        if failure.exitcode < 0:
            print(
                f"error: the training process of rank {rank} was ended by "
                f"{signal.Signals(-failure.exitcode).name}; go on with --resume",
                file=sys.stderr,
            )
        sys.exit(1)
    except (RendezvousConnectionError, RendezvousTimeoutError) as missed:
        reason = missed.__cause__ or missed
        print(
            "error: the machines did not meet "
            f"({(str(reason) or type(reason).__name__).splitlines()[0]}); start the run script on "
            "all NNODES of them within ten "
            "minutes, with the same MASTER_ADDR, MASTER_PORT and RDZV_ID, NODE_RANK=0 on the "
            "machine that MASTER_ADDR names, and MASTER_PORT open there",
            file=sys.stderr,
        )
        sys.exit(1)
    except SignalException as stopped:
        sys.exit(128 + int(stopped.sigval))

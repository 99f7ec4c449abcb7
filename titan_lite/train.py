"""A worker process: `python -m titan_lite.train CONFIG.toml [--section.key=value ...]`, started by `titan_lite.launch`.

The first lines run before torch is imported: from then on the worker dies with its launcher and no stop signal is lost.
"""

from __future__ import annotations

import errno
import os
import sys

from titan_lite.run.signals import StopFlag, die_with_parent

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR)
"""What the machine's disks do to a run; not a fault of the program that a traceback would help to find."""


def main(arguments: list[str]) -> int:
    """Parse, then train. Returns the exit code."""
    die_with_parent()
    stop = StopFlag().install()
    from titan_lite.config.errors import main_guard

    with main_guard():
        from titan_lite.checkpoint.save import SaveError
        from titan_lite.config.load import load_job
        from titan_lite.hf.errors import ConversionError
        from titan_lite.parallel.world import is_lost_peer
        from titan_lite.trainer import Trainer

        try:
            # Checked once more with the world as it is: torchrun starts workers without the launcher's check.
            job = load_job(arguments[0], arguments[1:], int(os.environ.get("WORLD_SIZE", 1)))
            return Trainer(job, stop).run()
        except (SaveError, ConversionError) as error:
            print(error, file=sys.stderr)
            return 1
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            print(f"Training failed: {error}", file=sys.stderr)
            return 1
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            # Another rank is the one with something to say; this one only noticed.
            print(f"Lost contact with another rank: {str(error).splitlines()[0]}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

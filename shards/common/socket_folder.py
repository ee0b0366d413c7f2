"""A folder for the sockets of `multiprocessing`, whose paths are limited to 107 bytes (Unix).

It makes them in a folder of the temporary folder, which schedulers and workflow engines give long names.
"""

import multiprocessing
import os
import shutil
import tempfile
from multiprocessing import util

from shards.common.errors import UserError

LONGEST = 107 - len("/pymp-12345678/listener-12345678")  # bytes of a temporary folder that leave room for its sockets
SHORT = "/tmp"


def shorten_socket_paths() -> None:
    """Let this process, and those that it starts with `multiprocessing`, make sockets in /tmp if TMPDIR is too long.

    A UserError is raised if /tmp cannot be used either.
    """
    folder, settings = tempfile.gettempdir(), multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if os.name != "posix" or len(os.fsencode(folder)) <= LONGEST or settings.get("tempdir"):
        return
    try:
        short = tempfile.mkdtemp(prefix="pymp-", dir=SHORT)
    except OSError as error:
        raise UserError(
            f"TMPDIR is {folder}: sockets need a path of at most {LONGEST} bytes, and {SHORT} cannot be used "
            f"({error.strerror}): set TMPDIR to a shorter path"
        ) from error
    util.Finalize(None, shutil.rmtree, args=(short, True), exitpriority=-100)
    settings["tempdir"] = short

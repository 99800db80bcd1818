"""How a script ends: no rank hangs, no dead run exits 0, and the reason can be read.

A rank that raises ends the whole job: MPI_Abort under MPI, a code that is not 0 for torchrun.
The traceback goes to a file first, since a launcher may kill the processes before their last
words have come through.
"""

from __future__ import annotations

import datetime
import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from diff_dalle.distributed.world import World, detect_launch
from diff_dalle.errors import UsageError

ERROR_FILE = "error.txt"
_USAGE, _FAILED, _INTERRUPTED = 2, 1, 130
_NOTE = "written to "
_AGREE_S = 2.0  # how long a rank waits to see whether rank 0 reports the same mistake
_DRAIN_S = 0.3  # how long the launcher gets to read the last line


def run_main(
    main: Callable[[list[str]], int | None],
    argv: Sequence[str] | None = None,
    *,
    alone: bool = False,
) -> NoReturn:
    """Run a script's main function and end the process with the right code.

    A `UsageError` is printed as one line ``error: …``, once if all ranks met it, and the code
    is 2. Any other exception ends all ranks with code 1; its traceback goes to ``error.txt``
    in the folder of `errors_to`, else in ``$OPENAI_LOGDIR``, else to the terminal.

    Args:
        main: takes the arguments, returns the exit code (None is 0).
        argv: the arguments; by default the command line's.
        alone: the script works in one process: several, which would each do and write
            everything, are refused.
    """
    try:
        if alone:
            _require_one_process()
        code = main(list(sys.argv[1:] if argv is None else argv)) or 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except KeyboardInterrupt:
        rank, size = _place()
        if rank == 0:
            print("interrupted", file=sys.stderr)
        _end_all(_INTERRUPTED, size)
    except UsageError as error:
        _end_usage_error(error)
    except BaseException as error:
        _end_failure(error)
    _end_returned(code)


def _require_one_process() -> None:
    launch = detect_launch(os.environ)
    if launch.size > 1:
        raise UsageError(
            f"this script works in one process, but {launch.launcher} started {launch.size}: "
            "start it without mpiexec, srun or torchrun"
        )


@contextmanager
def errors_to(folder: str | Path, world: World) -> Iterator[None]:
    """Write an exception that passes through to ``error.txt`` in ``folder``, and let it pass.

    A `UsageError` is written as its line, anything else with its traceback. The file is
    appended to. A folder that does not exist yet is not made.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, (SystemExit, KeyboardInterrupt, GeneratorExit)):
            _record(error, Path(folder), world.rank)
        raise


def _end_returned(code: int) -> NoReturn:
    """End a rank that has nothing more to do, without harm to those that still have."""
    if dist.is_initialized():
        # Closes the connections: should another rank still wait for this one, it fails now.
        dist.destroy_process_group()
    # DDP in a cycle keeps the group's threads; one of them can abort the interpreter's exit.
    gc.collect()
    comm = _mpi_world()
    if comm is not None and comm.size > 1:
        _all_arrive(comm, deadline_s=math.inf)
    sys.exit(code)


def _end_usage_error(error: UsageError) -> NoReturn:
    """Print the line once where all ranks made the same mistake, and end all of them."""
    rank, size = _place()
    path = _recorded(error) or _record_by_environment(error, rank)
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    together = size > 1 and _others_agree(rank, size)
    if rank != 0 and not together:
        where = f" (see {path})" if path else ""
        print(f"error: rank {rank}: {error}{where}", file=sys.stderr, flush=True)
    if together:
        os._exit(_USAGE)  # everybody leaves: no need for the noise of an abort
    _end_all(_USAGE, size)


def _end_failure(error: BaseException) -> NoReturn:
    """Say where the traceback is, or print it, and end all ranks."""
    rank, size = _place()
    path = _recorded(error) or _record_by_environment(error, rank)
    if path is None:
        traceback.print_exception(error)
    reason = (str(error).splitlines() or [""])[0]
    who = f"rank {rank}: " if size > 1 else ""
    where = f" (traceback in {path})" if path else ""
    print(f"error: {who}{type(error).__name__}: {reason}{where}", file=sys.stderr, flush=True)
    _end_all(_FAILED, size)


def _record(error: BaseException, folder: Path, rank: int) -> str | None:
    """Append an error to the folder's file; remember the file in a note of the error."""
    if not folder.is_dir() or _recorded(error):
        return _recorded(error)
    path = folder / ERROR_FILE
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    text = f"error: {error}\n"
    if not isinstance(error, UsageError):
        text = "".join(traceback.format_exception(error))
    with suppress(OSError):  # a full disk must not hide the error itself
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{now}, rank {rank}\n{text}\n")
            file.flush()
            os.fsync(file.fileno())
        error.add_note(f"{_NOTE}{path}")
    return _recorded(error)


def _recorded(error: BaseException) -> str | None:
    """The file that an error was written to, or None."""
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(_NOTE)]
    return notes[0].removeprefix(_NOTE) if notes else None


def _record_by_environment(error: BaseException, rank: int) -> str | None:
    folder = os.environ.get("OPENAI_LOGDIR")
    return _record(error, Path(folder), rank) if folder else None


def _place() -> tuple[int, int]:
    """Rank and size, before, during and after `start`."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    with suppress(UsageError, ValueError):
        launch = detect_launch(os.environ)
        if launch.launcher != "alone":
            return launch.rank, launch.size
    comm = _mpi_world()
    return (comm.rank, comm.size) if comm else (0, 1)


def _mpi_world() -> Any:
    """MPI's world where this process has initialised MPI, else None."""
    module = sys.modules.get("mpi4py.MPI")
    return module.COMM_WORLD if module and not module.Is_finalized() else None


def _others_agree(rank: int, size: int) -> bool:
    """Whether every rank has come to report a mistake, within `_AGREE_S`."""
    comm = _mpi_world()
    if comm is None and detect_launch(os.environ).launcher == "torchrun":
        if rank != 0:
            time.sleep(_AGREE_S)  # torchrun ends this rank meanwhile, if rank 0 has left
        return False
    if comm is None:
        with suppress(ImportError, RuntimeError):
            from mpi4py import MPI

            comm = MPI.COMM_WORLD
    if comm is None or comm.size != size:
        return True  # without the launcher's MPI, every rank meets the same mistake
    return _all_arrive(comm, _AGREE_S)


def _all_arrive(comm: Any, deadline_s: float) -> bool:
    """Wait until all ranks call this; False after ``deadline_s`` seconds."""
    request = comm.Ibarrier()
    deadline = time.monotonic() + deadline_s
    while not request.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _end_all(code: int, size: int) -> NoReturn:
    """End this process, and with it all others of the job."""
    if size == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_DRAIN_S)
    comm = _mpi_world()
    if comm is not None and comm.size == size:
        comm.Abort(code)
    os._exit(code)

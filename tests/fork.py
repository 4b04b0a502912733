"""A script as a program in a process of its own that need not import torch first: a fork of a server where that has been
done and nothing else. (A fork of the tests' process would share tqdm's semaphore with all others: one that ends while it
holds it stops the rest for good.)"""
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NoReturn

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "datasets", "huggingface_hub", "jinja2.sandbox", "matplotlib.figure", "pandas",
                               "safetensors.torch", "tiktoken", "tokenizers"])


class Fork(SERVER.Process):
    """The process, with the methods of Popen's that are needed. `out` and `error` are files to be written on from their end."""

    def __init__(self, script: Path, flags: list[str], folder: Path, variables: dict, out: Path, error: Path, draws: bool):
        super().__init__(target=become, args=(script, flags, folder, variables, out, error, draws))
        self.start()

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, seconds: float) -> int:
        self.join(seconds)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired("a fork", seconds)
        return self.exitcode

    def send_signal(self, number: int) -> None:
        if self.exitcode is None:
            os.kill(self.pid, number)


def become(script: Path, flags: list[str], folder: Path, variables: dict, out: Path, error: Path, draws: bool) -> NoReturn:
    """Makes of this process one that has been started with a script."""
    import matplotlib.figure
    import torch
    status = 1
    try:
        os.chdir(folder)
        for number, (path, mode) in enumerate(((os.devnull, os.O_RDONLY), (out, os.O_WRONLY), (error, os.O_WRONLY))):
            os.dup2(os.open(path, mode | os.O_APPEND), number)
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__ = [
            open(number, mode, buffering, encoding="utf-8", closefd=False)
            for number, (mode, buffering) in enumerate((("r", -1), ("w", -1), ("w", 1)))]
        signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell ignores it in what runs in the background,
        signal.signal(signal.SIGHUP, signal.SIG_DFL)                # nohup this one
        os.environ.clear()
        os.environ.update(variables)
        torch.set_num_threads(1)
        if not draws:
            matplotlib.figure.Figure.savefig = lambda self, file, **_: file.write(b"a picture")
        sys.argv, sys.path[:0] = [str(script), *flags], [str(script.parent)]
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(status)

"""A process that has imported peftctl once, and forks a child for every command line that it is sent.

Each line of its standard input is a request in JSON, each line of its standard output what came of it. A child runs
with a canary, limits of memory and CPU time, a home of its own, and no terminal unless one is asked for.
"""

from __future__ import annotations

import gc
import json
import os
import pty
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

TRACEBACK = 70
"""Exit code of a child that a bug ended."""


def load() -> None:
    """Import what commands import, so that no child waits for it."""
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import gguf  # noqa: F401
    import PIL.Image
    import pyarrow.parquet  # noqa: F401
    import requests  # noqa: F401  # its import tries a socket, of no address
    import transformers
    from transformers.models.auto import modeling_auto  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from peftctl.verbs import adapters, data, evaluate, export, generate, merge, plan, train  # noqa: F401

    PIL.Image.init()
    assert transformers.AutoTokenizer
    assert transformers.PreTrainedTokenizerFast
    assert transformers.AutoModelForCausalLM


def megabytes(key: str) -> float:
    """A figure of this process's memory."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(key + ":"))


def child(request: dict[str, Any]) -> int:
    """What happens in a child, to its exit code."""
    import torch
    from hostile.canary import PAYLOADS, watch

    from peftctl.cli import main

    torch.set_num_threads(1)  # its pool is the parent's: made anew here, before threads that load a model race for it
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    tempfile.tempdir = None  # the parent's
    sys.path[:] = [*request["path"], *sys.path]
    report = os.open(request["report"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    room = int(megabytes("VmSize") + request["megabytes"]) << 20
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch(report, request["root"], request["allowed"])
    if request["payload"]:
        PAYLOADS[request["payload"]](Path(request["cwd"]))
        return 0
    return main(request["words"])


def streams(request: dict[str, Any], terminal: int | None) -> None:
    """Standard input is empty; the others go to files, or to a terminal."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        file = terminal if terminal is not None else os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait, and say what came of it."""
    master, terminal = pty.openpty() if request["terminal"] else (None, None)
    started = time.monotonic()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = TRACEBACK
        try:
            os.setsid()
            os.write(writing, str(megabytes("VmRSS")).encode())  # not all of the parent's pages are mapped here
            os.close(writing)
            streams(request, terminal)
            code = child(request)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    before = float(os.read(reading, 100))
    for end in (reading, writing, *([terminal] if terminal is not None else [])):
        os.close(end)
    said, over = b"", False
    while True:
        if master is not None and select.select([master], [], [], 0)[0]:
            try:
                said += os.read(master, 1 << 16)
            except OSError:  # the child is gone
                os.close(master)
                master = None
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > request["seconds"] + 20:
            over = True
            os.killpg(pid, signal.SIGKILL)
            _, status, used = os.wait4(pid, 0)
            break
        time.sleep(0.002)
    if master is not None:
        while select.select([master], [], [], 0)[0]:
            try:
                said += os.read(master, 1 << 16)
            except OSError:
                break
        os.close(master)
    ended = os.waitstatus_to_exitcode(status)
    return {
        "code": None if ended < 0 else ended,
        "signal": -ended if ended < 0 else None,
        "hung": over,
        "seconds": used.ru_utime + used.ru_stime,
        "grown": used.ru_maxrss / 1024 - before,
        "screen": said.decode(errors="replace"),
    }


def warm(folder: str) -> None:
    """Run good command lines here, so that no child imports, compiles or remembers what all of them need."""
    from peftctl.cli import main

    os.chdir(folder)
    for words in (["validate", "bad.yaml"], ["data", "recipe.yaml"], ["generate", "adapter", "hi"]):
        main(words)
    gc.collect()
    gc.freeze()  # what a child does not touch is not copied


def serve() -> None:
    """Until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    errors = os.dup(2)
    os.dup2(1, 2)
    load()
    warm(sys.argv[1])
    os.dup2(errors, 2)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve()

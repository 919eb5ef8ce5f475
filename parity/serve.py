"""The process of one side, which imports one framework: `python -m parity.serve JOB`, where JOB is a JSON object.

It answers the requests that `sides/worker.py` sends, one JSON object per line, to its standard input.
"""

import concurrent.futures
import contextlib
import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from input_pipeline.errors import RequestError
from input_pipeline.examples import DatasetError
from input_pipeline.exits import collect_less
from parity.sides.side import Side
from parity.sides.tasks import ForwardTasks
from parity.sides.worker import Progress


def main() -> None:
    """Answers requests until its standard input ends."""
    collect_less()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log instead of between the replies
    job = json.loads(sys.argv[1])

    def reply(**content: Any) -> None:
        replies.write(json.dumps(content) + "\n")

    def progress(done: int, total: int) -> None:
        reply(progress=(done, total))

    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), name="requests", daemon=True).start()
    # imports before the first request, so that several processes do it at once; an error is the answer to the request
    future: concurrent.futures.Future[ForwardTasks] = concurrent.futures.Future()
    try:
        future.set_result(_tasks(progress, **job))
    except Exception as error:
        future.set_exception(error)
    while True:
        request = json.loads(requests.get())
        try:
            tasks = future.result()
            arguments = request["arguments"]
            fault = arguments.pop("fault", None)
            with tasks.injected(fault):
                answer, arrays = getattr(tasks, request["task"])(**arguments)
            if arrays is not None and job["rank"] == 0:
                np.savez(request["path"], **arrays)
            reply(answer=answer, saved=arrays is not None)
        except (RequestError, DatasetError) as error:
            reply(refused=str(error))
        except Exception as error:
            traceback.print_exc()
            reply(failed=f"{type(error).__name__}: {error}".splitlines()[0])
            if job["rank"]:
                os._exit(1)  # so that the processes that wait for this one fail


def _read_requests(requests: "queue.SimpleQueue[str]") -> None:
    """Puts the lines of standard input into the queue while tasks compute, in a thread of its own. When the input ends,
    nobody waits for answers; it then kills what this process has started, such as a DataLoader's workers, and ends it.
    """
    with open(0, closefd=False) as stream:  # Python takes the lock of sys.stdin when it exits
        for line in stream:
            requests.put(line)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(0)


def _tasks(progress: Progress, *, side: dict, precision: str, weights: str, meeting: str, rank: int) -> ForwardTasks:
    """Imports the side's framework and returns its tasks."""
    if side["framework"] == "jax":
        from parity.in_jax.timing import TimedJax

        return TimedJax(Side(**side), precision, weights, progress)
    if side["framework"] != "torch":
        from parity.exported.tasks import ExportedSide

        return ExportedSide(Side(**side), precision, progress)
    from parity.in_torch.timing import TimedTorch

    return TimedTorch(Side(**side), precision, weights, progress, rank=rank, meeting=Path(meeting))


if __name__ == "__main__":
    main()

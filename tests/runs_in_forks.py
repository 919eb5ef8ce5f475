"""Imports bit_jax.train once and runs it in a fork for every line on standard input: `runs_in_forks.py PRESET --flags`.

Of each run it prints the process number at the start and the exit status at the end, so that starting twenty runs costs
no more imports than one.
"""

import faulthandler
import os
import sys

import grain  # noqa: F401 (runs import it when they first read)

from bit_jax import train
from input_pipeline import image_file  # noqa: F401 (as grain)
from input_pipeline.exits import exit_code

faulthandler.enable()
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(exit_code(train.main))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

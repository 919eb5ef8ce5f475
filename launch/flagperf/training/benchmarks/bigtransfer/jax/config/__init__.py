"""The case's configuration as a module, which FlagPerf's driver changes by the machine's own file."""

from ._base import *  # noqa: F403 (FlagPerf's driver reads the names of this module)
from .mutable_params import mutable_params as mutable_params

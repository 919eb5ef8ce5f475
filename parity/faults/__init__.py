"""What can be wrong with one side?

Known faults, of ports of BiT and inside one unit. `selftest` injects each into one side and requires that it is found.
A fault patches the very code that training runs, within a `with` block. It imports that code when it is injected, so
that this folder imports neither framework.
It may import: input_pipeline, bit_jax.
"""

from parity.faults import additions, operations, ports, probe
from parity.faults.registry import FAULTS, Fault, injected, of

__all__ = ["FAULTS", "Fault", "additions", "injected", "of", "operations", "ports", "probe"]

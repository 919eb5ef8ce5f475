#!/bin/bash
# FlagPerf runs this in the new image. The packages of the case itself come from its requirements.txt, before each run.
python3 -c "import jax; print('JAX', jax.__version__)"

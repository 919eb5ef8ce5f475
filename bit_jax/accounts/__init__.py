"""Where did the time of a run go?

From seconds by activity of this process, over WORKDIR/starts.jsonl, which every start of a run adds to, to an account
of every second since the first start.
It may import: input_pipeline, bit_jax.process.
"""

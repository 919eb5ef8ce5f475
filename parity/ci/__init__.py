"""How does a comparison guard changes?

Rungs as tests of pytest, and a run beside the runs before it.
It may import: input_pipeline, parity.ladder, parity.report, parity.bundles.
"""

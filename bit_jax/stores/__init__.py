"""Where does a work directory lie that is no directory? Objects in a store, and the local copy of them.

It may import: input_pipeline.
"""

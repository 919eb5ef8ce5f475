"""How is a page written?

One self-contained HTML file: a template of the room that asks, the style that all pages share, images as data URLs,
plots as SVG.
It may import: input_pipeline.
"""

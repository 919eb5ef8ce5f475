"""Which weights come with the package?

A small BiT that was trained on Fashion-MNIST; the README.md beside its file says how.
It may import: nothing of this project.
"""

"""The same BiT in PyTorch, and the comparison."""

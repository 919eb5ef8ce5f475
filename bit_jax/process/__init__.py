"""How does this process live with its operating system?

Memory in large pages, and threads that report without holding up the work.
It may import: nothing of this project.
"""

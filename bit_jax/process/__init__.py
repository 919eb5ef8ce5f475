"""What does this process take from the operating system?

Memory in large pages.
It may import: nothing of this project.
"""

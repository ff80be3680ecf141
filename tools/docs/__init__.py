"""What keeps the documentation true: it is checked, partly generated, and its commands are run.

`python -m tools.docs check` compares pages with the command line, the Makefile and the files; `generate` writes the
pages that are made from code; `run` runs the commands of pages; `pictures` draws the pictures.
"""

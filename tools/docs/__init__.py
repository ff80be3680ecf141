"""Keep the documentation correct: check it, generate parts of it, and run its commands.

`python -m tools.docs check` compares pages with the command line, the Makefile and the files; `generate` writes the
pages that are made from code; `run` runs the commands of pages; `pictures` draws the pictures.
"""

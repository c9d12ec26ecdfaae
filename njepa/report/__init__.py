"""One self-contained HTML page from run folders: what happened, what was learnt, what is missing.

It reads artefacts only: the files of the folder, its checkpoint and the images of its source.
"""

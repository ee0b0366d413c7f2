"""The command `maskstream export`: a dataset, or a selection of it, in the formats that other trainers read.

One module per format writes what `samples` of `export.py` yields; `torchvision.py` is a torch dataset instead of files.
"""

"""A program for `run_forked`: the command line with standard output and standard error apart.

apart.py STDOUT STDERR ARGUMENT...        each a file to write; "gone" is a pipe whose reader has left
"""

import os
import sys

from ds_higgs.cli import entry_point


def redirect(descriptor: int, target: str) -> None:
    if target == "gone":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(writer, descriptor)


if __name__ == "__main__":
    redirect(1, sys.argv[1])
    redirect(2, sys.argv[2])
    del sys.argv[1:3]
    entry_point()

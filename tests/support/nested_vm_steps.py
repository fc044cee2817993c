"""What tests/stress/test_nested_vm.py runs in its guest: `imgsnap vm run`, given more time.

An emulated emulator takes 100 s to its guest's init.
"""

import sys

from imgsnap.vm.machine import Machine
from imgsnap_cli.main import main

LIMIT_S = 600.0

if __name__ == "__main__":
    Machine.wait_started.__defaults__ = (LIMIT_S,)
    Machine.wait_ready.__defaults__ = (LIMIT_S,)
    sys.exit(main(["vm", "run", "--emulate", *sys.argv[1:]]))

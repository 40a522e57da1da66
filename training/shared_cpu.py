"""To be imported before torch: let its threads wait for each other without keeping others from the CPU.

OpenMP's threads spin at every barrier, GNU's 300,000 times before they sleep: beside another busy process each spins
away the time that the one it waits for needs. docs/benchmarks.md has what 1,000 cost and save.
"""

import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

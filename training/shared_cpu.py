"""To be imported before torch: let its threads sleep while they wait for each other, unless the user has said how.

OpenMP's threads spin at every barrier. With one other busy process on 2 cores that makes a step 9 times slower; on an
idle machine sleeping costs nothing that could be measured (docs/benchmarks.md).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

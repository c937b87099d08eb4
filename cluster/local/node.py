"""`ray start ARGUMENTS` for a node of a cluster that lives on 127.0.0.1 and nowhere else.

Ray binds to loopback where its own switch for single-machine clusters is off, and refuses to add
nodes to such a cluster: here the switch is off for everything that is started, and on for the
question whether a node may join. Several raylets may share an address, as in Ray's own tests.
"""

from __future__ import annotations

import os
import sys

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # inherited by the raylet and its workers

from ray._private import ray_constants, services
from ray.scripts import scripts

ray_constants.ENABLE_RAY_CLUSTER = True
services.get_node_ip_address = lambda address=None: "127.0.0.1"

if __name__ == "__main__":
    sys.argv = ["ray", "start", *sys.argv[1:]]
    sys.exit(scripts.main())

"""`ray start ARGUMENTS` for a node of a cluster that lives on 127.0.0.1 and nowhere else.

Ray binds to loopback where its own switch for single-machine clusters is off, and refuses to add
nodes to such a cluster: here the switch is off for everything that is started, and on for the
question whether a node may join. Several raylets may share an address, as in Ray's own tests.

They share a session's folder, too, but not the one below it where a job's code is unpacked: a node that
gets its first task unpacks it anew, and would take it away from under the job and the other nodes.
"""

from __future__ import annotations

import os
import sys

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # inherited by the raylet and its workers

from ray._private import ray_constants, services
from ray.scripts import scripts

ray_constants.ENABLE_RAY_CLUSTER = True
ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"runtime_resources_{os.getpid()}"
services.get_node_ip_address = lambda address=None: "127.0.0.1"

if __name__ == "__main__":
    sys.argv = ["ray", "start", *sys.argv[1:]]
    sys.exit(scripts.main())

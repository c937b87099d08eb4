"""The door to Ray Serve.

`build_app` is the import path of deployments/serve/*.yaml; `serving` puts the same graph on a cluster for
the length of a block, and `run` until somebody stops it.
"""

from recray.serving.on_ray.graph import build_app
from recray.serving.on_ray.start import run, serving

__all__ = ["build_app", "run", "serving"]

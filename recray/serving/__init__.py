"""The serving wing: recommendations over HTTP, from one process (fused) or three kinds of them (split).

`schema`, `http`, `auth`, `batching`, `stages`, `ingress`, `planning` and `profiles` are plain Python that a
test runs without a cluster; `on_ray` puts them into Ray Serve deployments.
"""

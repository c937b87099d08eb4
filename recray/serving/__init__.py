"""The serving wing: Ingress -> Retriever -> Ranker over HTTP.

`schema`, `http`, `auth`, `batching` and `stages` are plain asyncio that a test runs without a
cluster; `on_ray` puts the three stages into Ray Serve deployments.
"""

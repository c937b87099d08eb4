"""The serving wing: recommendations over HTTP, from one process (fused) or three kinds of them (split).

`schema`, `http`, `auth`, `batching`, `stages`, `ingress`, `planning` and `profiles` are plain Python that a
test runs without a cluster, and so is what changes the bundle under load: `generations` (the pointer and its
steps), `resident` (what a replica holds), `router` (who answers), `shipping`, `parity`, `canary`, `items` and
`admin`. What is noted of requests is `seen`: `metrics`, `answers` (kept for GET /v1/why) and `tracing`.
`on_ray` puts them into Ray Serve deployments.
"""

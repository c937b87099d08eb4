"""The tuning wing: trials under a latency and a size budget, with or without Ray.

space (what may vary) -> searcher (what to try next) -> sweep (try it, keep it) -> pareto (choose).
"""

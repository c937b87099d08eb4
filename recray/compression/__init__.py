"""Smaller forms of what was trained: codecs for tables, graphs for networks."""

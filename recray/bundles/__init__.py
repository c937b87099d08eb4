"""Bundles: everything a replica needs in one immutable folder; how one is built, opened and asked."""

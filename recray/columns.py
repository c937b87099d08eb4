"""The names of columns, once. Outside there are ids, inside there are rows."""

from __future__ import annotations

USER = "user"  # external id, a string
ITEM = "item"
TIME = "time"  # int64, seconds since 1970-01-01 UTC
WEIGHT = "weight"  # float32, strength of an interaction or a rating
EVENT = "event"  # kind of an interaction: view, cart, buy, rating ...

USER_ROW = "user_row"  # int32, dense row in the dataset's user ids
ITEM_ROW = "item_row"  # int32, dense row in the dataset's item ids

ROLES = (USER, ITEM, TIME, WEIGHT, EVENT)  # what --columns may name
SPLITS = ("train", "valid", "test")

"""What a list of recommendations is worth: pure functions of arrays, one value a user where that is possible.

Shapes: B users, k places of a list (best first; -1 where there is no item), N items of the catalogue.
"""

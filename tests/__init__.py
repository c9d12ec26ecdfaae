"""The tests. A package, so that ``tests.support`` is no other's."""

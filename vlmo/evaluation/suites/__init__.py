"""The suites, one file a family; importing this package registers them."""

from vlmo.evaluation.suites import compositional, eccv, retrieval

__all__ = ["compositional", "eccv", "retrieval"]

"""The suites, one file a family; importing this package registers them."""

from vlmo.evaluation.suites import compositional, eccv, probes, retrieval, zero_shot

__all__ = ["compositional", "eccv", "probes", "retrieval", "zero_shot"]

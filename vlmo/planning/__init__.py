"""What a run will take, worked out before any device is touched.

    from vlmo.planning import memory_of

    memory_of(settings).total
"""

from vlmo.planning.memory import Memory, Planner, memory_of

__all__ = ["Memory", "Planner", "memory_of"]

"""What a run will take, worked out before any device is touched.

from vlmo.planning import plan_run
from vlmo.settings import Settings

plan = plan_run(Settings.from_config(vlmo.resolve("task_mlm_itm_itc_base", num_gpus=8)))
print(plan)
plan.memory[plan.own].total
"""

from vlmo.planning.devices import DEVICES, Device
from vlmo.planning.memory import Memory, Planner, memory_of
from vlmo.planning.plan import Plan, Variant, plan_run

__all__ = ["DEVICES", "Device", "Memory", "Plan", "Planner", "Variant", "memory_of", "plan_run"]

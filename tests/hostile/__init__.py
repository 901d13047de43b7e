"""A catalogue of programs that try to cheat the grader or harm its machine, and of honest programs that must pass.

Each case is data for a test or benchmark. Pass it to `grading.grade_code`; never run it in any other way. The families
follow the sandbox's specification, plus one for each form of tests: scripts, checks, asserts. The chapter `graders` has
answers for the graders that read formulas.
"""

from hostile import channel, forms, graders, harness, honest, lies, processes, resources, world
from hostile.case import MARK, Case

MODULES = lies, harness, channel, resources, processes, world, forms
HOSTILE = [case for module in MODULES for case in module.CASES]
HONEST = honest.CASES
GRADERS = graders.CASES
FAMILIES = tuple(dict.fromkeys(case.family for case in HOSTILE))

__all__ = ["FAMILIES", "GRADERS", "HONEST", "HOSTILE", "MARK", "Case"]

"""DPM-Solver++(3M), the multistep solver of third order (Lu et al. 2022, arXiv 2211.01095). Equals diffusers'
DPMSolverMultistepScheduler 0.42 with `solver_order` 3.
"""

from __future__ import annotations

from functools import partial

from runtime.diffusion.solver import Solver
from runtime.diffusion.solvers.dpmpp_2m import SOLVER as DPMPP_2M
from runtime.diffusion.solvers.dpmpp_2m import prepare

SOLVER = Solver(partial(prepare, most=3), DPMPP_2M.spacings)

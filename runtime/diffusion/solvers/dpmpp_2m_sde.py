"""SDE-DPM-Solver++(2M): the stochastic equation, one draw of fresh noise in every step but one to no noise (Lu et al.
2022, section 4.3; arXiv 2211.01095). Equals diffusers' DPMSolverMultistepScheduler 0.42 with `algorithm_type`
sde-dpmsolver++.
"""

from __future__ import annotations

from functools import partial

from runtime.diffusion.solver import Solver
from runtime.diffusion.solvers.dpmpp_2m import SOLVER as DPMPP_2M
from runtime.diffusion.solvers.dpmpp_2m import prepare

SOLVER = Solver(partial(prepare, noisy=True), DPMPP_2M.spacings)

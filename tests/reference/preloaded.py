"""Imported once by the process from which `reference.processes` forks: all that a run of ours imports."""

from refine_verl.command.quiet import quieten_third_parties

quieten_third_parties()  # as `refine_verl.main` does before these imports

import refine_verl.main  # noqa: E402
import refine_verl.preflight.run  # noqa: E402
import refine_verl.trainer.launch  # noqa: E402
import refine_verl.workers.worker  # noqa: E402, F401

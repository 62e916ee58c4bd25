"""Pages about runs: `report.html` and comparisons, from what `refine_verl.record` reads. No torch, ray or verl."""

from refine_verl.report.compare import write_comparison
from refine_verl.report.html import write_report

__all__ = ["write_comparison", "write_report"]

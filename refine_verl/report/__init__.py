"""What a run tells: `metrics.jsonl`, the progress display, `report.html` and comparisons. No torch, ray or verl."""

from refine_verl.report.compare import write_comparison
from refine_verl.report.html import ReportError, write_report
from refine_verl.report.metrics import METRICS_FILE, MetricsError, MetricsWriter, merge_steps, read_metrics
from refine_verl.report.progress import TrainingProgress

__all__ = [
    "METRICS_FILE",
    "MetricsError",
    "MetricsWriter",
    "ReportError",
    "TrainingProgress",
    "merge_steps",
    "read_metrics",
    "write_comparison",
    "write_report",
]

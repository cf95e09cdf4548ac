"""DeepSpeed's monitors (TensorBoard, W&B, CSV, Comet), none of which can stop a run.

DeepSpeed itself builds them inside `deepspeed.initialize` and lets their errors through; here each
stands alone, and one that fails is named and left out.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepspeed.monitor.comet import CometMonitor
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor

from potstill.console import is_main_rank, say
from pretrain.ds_config import MONITORS

Event = tuple[str, float, int]
"""A name, a value, a step."""

Failed = Callable[[int, str, str], None]
"""Told of a monitor that failed: the step, its name, the reason."""

BUILDERS = dict(
    zip(MONITORS, (TensorBoardMonitor, csvMonitor, WandbMonitor, CometMonitor), strict=True)
)


def without_monitors(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's engine gets: it builds no monitors of its own."""
    return {name: section for name, section in ds_config.items() if name not in MONITORS}


class Monitors:
    """Stands in for DeepSpeed's `MonitorMaster`, which has the same `enabled` and `write_events`.

    Args:
        ds_config: resolved, so that the files of monitors lie in the run's folder.
        step: where the run begins. failed: told the step, the name and the reason of a failure.
    """

    def __init__(self, ds_config: Mapping[str, Any], step: int, failed: Failed) -> None:
        self._failed = failed
        self._running: dict[str, Any] = {}
        settings = get_monitor_config(ds_config)
        for name in MONITORS if is_main_rank() else ():
            section = getattr(settings, name)
            if section.enabled:
                self._start(name, section, step)

    @property
    def enabled(self) -> bool:
        """Whether any is left."""
        return bool(self._running)

    def _start(self, name: str, section: Any, step: int) -> None:
        try:
            self._running[name] = BUILDERS[name](section)
        except Exception as error:  # whatever a service or a missing package comes up with
            self._leave_out(name, error, step)

    def write_events(self, events: Sequence[Event]) -> None:
        """Send numbers to all monitors that still run."""
        for name, monitor in list(self._running.items()):
            try:
                monitor.write_events(events)
            except Exception as error:
                del self._running[name]
                self._leave_out(name, error, events[-1][2])

    def _leave_out(self, name: str, error: Exception, step: int) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._failed(step, name, reason)
        say(f"note: the monitor {name} failed and is left out; training goes on ({reason})")

"""What a run tells the person who watches it."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping

from tqdm import tqdm

# The measurements of a line on the screen, with their format; the files hold all.
_SHOWN = {
    "loss": "{:.4f}",
    "val_loss": "{:.4f}",
    "ema_val_loss": "{:.4f}",
    "val_acc_i2t": "{:.3f}",
    "val_caption_wins": "{:.3f}",
    "grad_norm": "{:.3f}",
    "lr": "{:.2e}",
    "img_per_sec": "{:.1f}",
    "data_wait_share": "{:.0%}",
    "time_to_first_batch": "{:.1f}s",
    "bad_share": "{:.2%}",
}


class Report:
    """Lines and a progress bar, on rank 0 only."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._bar: tqdm | None = None

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._shown:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start(self, step: int, iterations: int) -> None:
        """Show a bar that stands at ``step``."""
        if self._shown:
            # A log file takes a line now and then, not ten a second.
            seconds = 0.2 if sys.stderr.isatty() else 30.0
            self._bar = tqdm(
                total=iterations, initial=step, unit="step", mininterval=seconds, smoothing=0.05
            )

    def step(self) -> None:
        """Move the bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        """Print a line of measurements, and the pace beside the bar."""
        parts = [f"{n} {text.format(values[n])}" for n, text in _SHOWN.items() if n in values]
        eta = datetime.timedelta(seconds=round(values.get("eta", 0.0)))
        self.say(f"step {step}: {', '.join(parts)}, eta {eta}")
        if self._bar is not None:
            waiting = f"{values.get('data_wait_share', 0):.0%}"
            self._bar.set_postfix_str(
                f"{values.get('img_per_sec', 0):.1f} img/s, waiting {waiting}", refresh=False
            )

    def stop(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

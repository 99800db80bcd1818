"""Say what shards hold, what is wrong with them and what to do about it, or in which order.

python scripts/inspect_data.py D/train --image_size 64 --out_dir inspection
python scripts/inspect_data.py D/train E/train --max_samples 10000 --caption_key alt_text
python scripts/inspect_data.py D/train --show_order 0:10 --global_batch_size 64 --ranks 8
"""

from __future__ import annotations

import dataclasses

from diff_dalle.data.inspection.run import InspectConfig, inspect_data
from diff_dalle.data.inspection.show_order import OrderConfig, order_lines
from diff_dalle.distributed import run_main
from diff_dalle.flags import Parser


def inspect(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-"):
        argv = ["--data_dir", *argv]
    values = Parser([InspectConfig, OrderConfig]).parse(argv)
    names = [field.name for field in dataclasses.fields(OrderConfig)]
    order = OrderConfig(**{name: values.pop(name) for name in names})
    cfg = InspectConfig(**values)
    if order.show_order is not None:
        for line in order_lines(cfg, order):
            print(line, flush=True)
        return
    inspection = inspect_data(cfg)
    print(inspection.text)
    inspection.require_usable()


def main() -> None:
    run_main(inspect, alone=True)


if __name__ == "__main__":
    main()

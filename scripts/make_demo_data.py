"""Write a captioned demo data set as webdataset shards.

python scripts/make_demo_data.py --source shapes --out_dir D --num_train 20000 --num_val 1000
python scripts/make_demo_data.py --source emoji --artwork icons.json --out_dir E --image_size 1024
"""

from __future__ import annotations


def write(argv: list[str]) -> None:
    from diff_dalle.data.demo import DemoDataConfig, make_demo_data
    from diff_dalle.flags import Parser

    print(make_demo_data(DemoDataConfig(**Parser([DemoDataConfig]).parse(argv))))


# Everything is imported inside: the drawing processes run the top of this file once each.
def main() -> None:
    from diff_dalle.distributed import run_main

    run_main(write, alone=True)


if __name__ == "__main__":
    main()

"""Pack captioned pictures of your own into webdataset shards.

python scripts/pack_dataset.py --images drawings/ --out_dir data/    # with a .txt beside each
python scripts/pack_dataset.py --images drawings/ --captions captions.jsonl --out_dir data/
python scripts/pack_dataset.py --parquet rows.parquet --out_dir data/
python scripts/pack_dataset.py --hf_dataset NAME --hf_split train --out_dir data/
"""

from __future__ import annotations


def pack(argv: list[str]) -> None:
    from diff_dalle.data.packing.pack import PackConfig, pack_dataset
    from diff_dalle.flags import Parser

    print(pack_dataset(PackConfig(**Parser([PackConfig]).parse(argv))))


# Everything is imported inside: the packing processes run the top of this file once each.
def main() -> None:
    from diff_dalle.distributed import run_main

    run_main(pack, alone=True)


if __name__ == "__main__":
    main()

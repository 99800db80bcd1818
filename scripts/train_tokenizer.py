"""Train a byte-level BPE on the captions of shards, for runs to use with --tokenizer.

python scripts/train_tokenizer.py --data_dir D/train E/train --out D/tokenizer.json
python scripts/train_tokenizer.py --data_dir D/train --out big.json --vocab_size 16384
"""

from __future__ import annotations

from diff_dalle.data.tokenizer_training import TokenizerConfig, train_tokenizer
from diff_dalle.distributed import run_main
from diff_dalle.flags import Parser


def train(argv: list[str]) -> None:
    print(train_tokenizer(TokenizerConfig(**Parser([TokenizerConfig]).parse(argv))))


def main() -> None:
    run_main(train, alone=True)


if __name__ == "__main__":
    main()

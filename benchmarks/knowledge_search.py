"""What is knowledge of so many bytes a token worth to a student? The curve over eight cuts.

    python benchmarks/knowledge_search.py --output runs/knowledge-search

`finetune/search_cuts.py` on Wikipedia: the packaged real teacher, students of three of its six
layers, two seeds, a held-out loss and SST-2. Storing and training took 52 minutes on two cores that
had other work too, fine-tuning not counted; the same command goes on where it stopped.
Writes `results/knowledge-search.{json,md}` and `docs/images/knowledge-curve.svg`.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from common import (
    DATA,
    IMAGES,
    RESULTS,
    ROOT,
    execute,
    machine,
    packaged_teacher,
    shard,
    write_ds_config,
    write_report,
)

from data_prep.shard_format import TRAIN, VALIDATION, read_manifest

ARTICLES, ROWS = 190, 32  # rows of a step: 160 steps see no row twice
KEEPS = "1l_1t,1l_10t_0.1h,1l_10t,1l,2l_10t_0.1h,2l_50t,3l_10t,3l_50t"
SETTINGS: dict[str, Any] = {
    "objective": "hid-seq",
    "student_layers": 3,
    "init": "uniform",
    "steps": 160,
    "seeds": 2,
    "keeps": KEEPS,
    "validation_rows": 160,
    "tasks": "sst2",
    "task_rows": 1000,
    "epochs": 2,
}


def shards(output: Path) -> Path:
    """Shards of the first articles of Wikipedia."""
    few = output / "articles.parquet"
    if not few.exists():
        output.mkdir(parents=True, exist_ok=True)
        source = sorted((DATA / "corpus").glob("wiki-*.parquet"))[0]
        parquet.write_table(parquet.read_table(source).slice(0, ARTICLES), few)
    return shard(few, packaged_teacher(), output / "shards")


def search(output: Path, data: Path, ds_config: Path) -> Path:
    """The folder of the finished search."""
    places = {"data": data, "teacher": packaged_teacher(), "ds_config": ds_config}
    places |= {"task_data": DATA / "glue", "output": output / "search"}
    flags = [word for n, value in (places | SETTINGS).items() for word in (f"--{n}", str(value))]
    execute([sys.executable, "finetune/search_cuts.py", *flags])
    return places["output"]


def report_of(found: Path, data: Path, ds_config: Path) -> dict[str, Any]:
    """Figures of a search, and what they depend on, without paths of the machine."""
    rows = read_manifest(data).splits
    return {
        "machine": machine(torch.device("cpu")),
        "settings": json.loads((found / "search.json").read_text())["settings"],
        "ds_config": json.loads(ds_config.read_text()),
        "data": {
            "documents": ARTICLES,
            "train_rows": rows[TRAIN].rows,
            "validation_rows": rows[VALIDATION].rows,
        },
        **json.loads((found / "results.json").read_text()),
    }


def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, help="folder of shards and search")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs" / "cpu_bf16.json")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--images", type=Path, default=IMAGES)
    options = parser.parse_args()
    output = options.output.absolute()
    data = shards(output)
    ds_config = write_ds_config(options.ds_config, output / "ds_config.json", ROWS, 1)
    found = search(output, data, ds_config)
    table = (found / "summary.md").read_text()
    write_report(
        options.results / "knowledge-search.json", report_of(found, data, ds_config), table
    )
    shutil.copyfile(found / "curve.svg", options.images / "knowledge-curve.svg")
    print(table, end="")


if __name__ == "__main__":
    main()

"Small tables of text that tests of rows and of tasks share, and how to write one as a file."
from pathlib import Path

import pandas as pd
from datasets import Dataset


def text(stem, n=8):
    return [f"{stem} {i}" for i in range(n)]


FRAME = pd.DataFrame({"line": ["a king", 'a "queen",\nquoted', "NA", "1999", "naïve", *text("a boy", 15)],
                      "label": ["calm", "loud", "None", "calm", "loud"] * 4})
ROWS = Dataset.from_dict({"line": text("line", 20), "other": text("other", 20), "label": [0, 1] * 10})


def save(frame: pd.DataFrame, file: Path) -> Path:
    "A frame as a file of the kind that its name says."
    kind = file.suffix[1:]
    if kind == "parquet":
        frame.to_parquet(file)
    elif kind in ("csv", "tsv"):
        frame.to_csv(file, index=False, sep="," if kind == "csv" else "\t")
    else:
        frame.to_json(file, orient="records", lines=kind == "jsonl", force_ascii=False)
    return file

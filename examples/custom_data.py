"""Train on data of one's own: `python examples/custom_data.py [FOLDER]`, a folder of class folders with images.

Without FOLDER: on arrays, here the embedded digits as even and odd ones. `Arrays` is all that a `Samples` must be.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from fasttht.config_file import from_flat, read_preset
from fasttht.pipelines.datasets import digits, folder_splits
from fasttht.pipelines.samples import Sample
from fasttht.pipelines.splits import Splits
from fasttht.resolve import resolve
from fasttht.train import Trainer


class Arrays:
    path, class_names, fingerprint = Path("digits by parity"), ("even", "odd"), "v1"  # change it with the data

    def __init__(self, split):
        source = digits(split)
        self.images = np.stack([source.sample(i).data.reshape(8, 8, 3) for i in range(len(source))])
        self.labels = source.labels % 2
        self.where = self.origin = "row {}".format
        self.sizes = lambda rows: (np.full(len(rows), 8), np.full(len(rows), 8))

    def __len__(self):
        return len(self.images)

    def sample(self, i):
        return Sample("raw", self.images[i].reshape(-1), height=8, width=8)


splits = Splits(**folder_splits(sys.argv[1])) if sys.argv[1:] else Splits(Arrays("train"), Arrays("val"))
options = {**read_preset("quickstart"), "replay": 4, "epochs": 4, "eval_steps": [10], "output": tempfile.mkdtemp()}
row = Trainer(resolve(from_flat(options, where="options")), splits).fit()
print(f"clean {row['clean_top1']:.1f} %, PGD-10 {row['pgd10_top1']:.1f} % of {row['images']} held-out images")

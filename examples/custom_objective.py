"""An objective of one's own, adversarial training with logit squeezing: `python examples/custom_objective.py`.

CE(f(x_adv), y) + 0.05 mean z^2 (Kannan et al. 2018): one class, one entry of OBJECTIVES and one of TRAITS.
"""

import tempfile

from fasttht.config_file import from_flat, read_preset
from fasttht.losses import normalized_cross_entropy
from fasttht.objectives import OBJECTIVES, Terms
from fasttht.resolve import resolve
from fasttht.train import Trainer
from fasttht.traits import TRAITS, Traits


class Squeeze:
    def __call__(self, model, views, bank, method, *, smoothing):
        logits = model(views.x_adv).logits
        loss_cls = normalized_cross_entropy(logits, views.y, smoothing=smoothing)
        loss_squeeze = 0.05 * logits.square().mean()
        return Terms(loss_cls + loss_squeeze, {"loss_cls": loss_cls, "loss_squeeze": loss_squeeze}, logits)


OBJECTIVES["squeeze"] = Squeeze()
TRAITS["squeeze"] = Traits(parts=("loss_squeeze",))  # attacked like `at`, one linear head, may be replayed

options = {
    **read_preset("quickstart"),
    "objective": "squeeze",
    "replay": 4,
    "epochs": 4,
    "eval_steps": [10],
    "output": tempfile.mkdtemp(),
}
row = Trainer(resolve(from_flat(options, where="options"))).fit()
print(f"clean {row['clean_top1']:.1f} %, PGD-10 {row['pgd10_top1']:.1f} %; the rows are in {options['output']}")

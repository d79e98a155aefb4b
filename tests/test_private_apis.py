"""What is used of other packages beyond their public APIs, each by its name: a release that moves
one of them fails here first.
"""

from lightning.pytorch import Trainer

from tdm_lightning.data.loader import trainer_position
from tests.data.test_sampling import Probe, make_data
from tests.helpers.localsets import make_arrow
from tests.helpers.trainers import QUIET


def test_lightning_tells_the_batch_of_an_epoch(tmp_path):
    positions = []

    class Positions(Probe):
        def on_train_batch_start(self, batch, batch_idx):
            positions.append(trainer_position(self.trainer))

    quiet = {"enable_checkpointing": False, "limit_val_batches": 0, "default_root_dir": tmp_path}
    trainer = Trainer(**QUIET, **quiet, max_epochs=2, limit_train_batches=2)
    assert hasattr(trainer.fit_loop, "batch_idx"), (
        "Lightning has no Trainer.fit_loop.batch_idx: see trainer_position in data/loader.py"
    )
    assert trainer_position(trainer) == (0, 0)
    trainer.fit(Positions(), make_data(tmp_path, make_arrow(tmp_path / "set")))
    assert positions == [(0, 1), (0, 2), (1, 1), (1, 2)]

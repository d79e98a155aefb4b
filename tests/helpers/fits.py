"""Small runs of ``tdm fit`` in its quickstart form on several nodes, for every method that has a
state of its own.
"""

from functools import partial
from itertools import chain

import torch
import yaml
from lightning.pytorch import Callback

from tdm_lightning import TokenReductionClassifier
from tdm_lightning.cli import main
from tdm_lightning.core.shards import local, whole
from tests.helpers.nodes import on_nodes

IMAGES, JOINT = 24, 8  # in the set; in a batch of all processes together
EPOCHS, BATCHES = 2, IMAGES // JOINT
AVERAGE = {
    "class_path": "lightning.pytorch.callbacks.EMAWeightAveraging",
    "init_args": {"decay": 0.5},
}
WARMUP = {
    "class_path": "tdm_lightning.callbacks.KeepRateWarmup",
    "init_args": {"start_epoch": 0, "epochs": 2},
}
TDM = {"class_path": "TDM", "init_args": {"keep_rate": 0.5, "layers": [1, 2]}}


def svite(masks):
    settings = {"interval": 2, "masks": masks, "death_rate": 0.5}
    return [{"class_path": "SViTE", "init_args": settings}, TDM]


#: Strategy, callbacks, and other settings of the model and the Trainer.
CASES = {
    "TDM": (TDM, [WARMUP], {}),
    "TDM, averaged": (TDM, [WARMUP, AVERAGE], {}),
    "SViTE, heads and units": (
        svite({"class_path": "Structured", "init_args": {"heads": 0.5, "units": 0.5}}),
        [],
        {},
    ),
    "SViTE, single weights": (
        svite({"class_path": "Unstructured", "init_args": {"density": 0.4}}),
        [WARMUP],
        {},
    ),
    "DyViT": (
        {"class_path": "DyViT", "init_args": {"layers": [1, 2], "freeze_epochs": 0}},
        [],
        {"weights": "start.ckpt"},
    ),
    "IARED2": (
        {
            "class_path": "IARED2",
            "init_args": {"groups": 2, "interpreter_epochs": 1, "block_epochs": 1},
        },
        [],
        {},
    ),
}
#: Those that draw nothing while they train: processes then make the steps of the joint batch.
DRAW_NOTHING = ("TDM", "TDM, averaged", "SViTE, heads and units", "SViTE, single weights")


class Notes(Callback):
    """Writes down what a process saw and what came of it."""

    def __init__(self, name):
        self.name, self.losses, self.seen, self.rates, self.masks = name, {}, [], [], []
        self.judged = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen += [(trainer.current_epoch, key) for key in map(key_of, batch[0])]
        self.rates.append(module.model.strategy.current_keep_rate)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.judged += [(trainer.current_epoch, key) for key in map(key_of, batch[0])]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses[trainer.current_epoch, batch_idx] = outputs["loss"].item()
        self.masks.append(masks_of(module))
        parameters = list(module.model.parameters())
        self.share = sum(map(local_size, parameters)) / sum(map(torch.numel, parameters))

    def on_fit_end(self, trainer, module):
        with whole(module):
            tensors = chain(module.model.named_parameters(), module.model.named_buffers())
            weights = {name: value.detach().clone() for name, value in tensors}
        teacher = module._teacher[0].state_dict() if module._teacher else {}
        stage = getattr(module.model.strategy, "stage", None)
        found = {
            "losses": self.losses,
            "seen": self.seen,
            "judged": self.judged,
            "rates": self.rates,
            "masks": self.masks,
            "share": self.share,
            "weights": weights,
            "teacher": dict(teacher),
            "stage": None if stage is None else tuple(stage),
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
        }
        torch.save(found, f"{self.name}_{trainer.global_rank}of{trainer.world_size}.pt")


def key_of(image):
    return hash(image.numpy().tobytes())


def local_size(weight):
    return local(weight.detach()).numel()


def masks_of(module):
    return {
        name: value.clone() for name, value in module.model.named_buffers() if ".masks." in name
    }


def arguments(folder, images, case, nodes, joint=JOINT, kept="kept", **trainer):
    """Of `tdm fit` in its quickstart form, as small as it goes; the layer stays in the folder."""
    strategy, callbacks, model = CASES[case]
    keep = {"dirpath": kept, "every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    keep = {
        "class_path": "ModelCheckpoint",
        "init_args": {**keep, "auto_insert_metric_name": False},
    }
    layer = {
        "trainer": {
            "max_epochs": EPOCHS,
            "num_nodes": nodes,
            "devices": 1,
            "strategy": "ddp_find_unused_parameters_true" if case == "IARED2" else "ddp",
            "check_val_every_n_epoch": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [*callbacks, keep],
            **trainer,
        },
        "model": {
            "strategy": strategy,
            "warmup_epochs": 0,
            "mixup": 0.0,
            "optimizer": "sgd",
            "lr": 0.1,
            "weight_decay": 0.0,
            **model,
        },
        "data": {
            "dataset": images,
            "cache_dir": images,
            "test_split": None,
            "batch_size": joint // nodes,
        },
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(layer))
    shape = [f"--model.model_kwargs.{name}" for name in ("depth=4", "embed_dim=24", "num_heads=2")]
    return ["fit", "--config=quickstart", "--config=small.yaml", *shape]


def sharded(processes, folders=False, split=1):
    """Settings of the Trainer for FSDP2."""
    settings = {
        "data_parallel_size": processes,
        "tensor_parallel_size": split,
        "save_distributed_checkpoint": folders,
    }
    return {"strategy": {"class_path": "ModelParallelStrategy", "init_args": settings}}


def fit(name, args):
    class Noted(TokenReductionClassifier):
        def configure_callbacks(self):
            return [Notes(name)]

    main(args, model_class=Noted)


def train(folder, images, case, nodes, *extra, name="run", **settings):
    """What each process noted."""
    args = arguments(folder, images, case, nodes, **settings)
    on_nodes(folder, partial(fit, name, [*args, *extra]), nodes)
    return [torch.load(folder / f"{name}_{rank}of{nodes}.pt") for rank in range(nodes)]


def start(folder):
    """Weights that a teacher can have."""
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1}
    shape |= {"depth": 4, "embed_dim": 24, "num_heads": 2}
    torch.manual_seed(3)
    module = TokenReductionClassifier("vit_tiny_patch16_224", None, 3, model_kwargs=shape)
    torch.save(module.model.vit.state_dict(), folder / "start.ckpt")


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **{"rtol": 0, "atol": 0, **tolerance})


def means(ranks):
    """The joint batch's loss of every step."""
    return {
        key: sum(rank["losses"][key] for rank in ranks) / len(ranks) for key in ranks[0]["losses"]
    }


def seen_in(ranks, epoch, what="seen"):
    return sorted(image for rank in ranks for at, image in rank[what] if at == epoch)
